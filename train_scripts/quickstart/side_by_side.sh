# Functions of quickstart.sh that run commands at the same time. It sources this file after
# train_scripts/functions.sh.
#
# start NAME LOG COMMAND...  starts a command, which may be a function. Its output goes to the file
#                            LOG, or to the terminal if LOG is empty.
# wait_for_commands          returns when all commands have ended. If one fails, the others are
#                            ended, and the exit status is that of the one that failed.
#
# Ctrl-C, SIGTERM, SIGHUP and SIGPIPE end the script, and its end is the end of the commands.
GRACE=60 # seconds that a training has after SIGTERM to finish its step and write a checkpoint
# One entry for each command. The process group has the number of its first process.
names=() logs=() pids=() headlines=() is_finished=()

start() {
    local name=$1 log=$2
    shift 2
    trap stop_commands EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 141' PIPE
    trap 'exit 143' TERM
    # With job control, each command has a process group of its own: a signal to the group ends all
    # processes of the command, and Ctrl-C is a signal to this script only.
    set -m
    if [ -n "$log" ]; then
        "$@" < /dev/null > "$log" 2>&1 &
    else
        "$@" < /dev/null &
    fi
    set +m
    names+=("$name") logs+=("$log") pids+=("$!") headlines+=("") is_finished+=("")
}

wait_for_commands() {
    local index status num_running
    while true; do
        num_running=0
        for index in "${!pids[@]}"; do
            if [ -n "${is_finished[index]}" ]; then continue; fi
            if kill -0 "${pids[index]}" 2> /dev/null; then
                num_running=$((num_running + 1))
                continue
            fi
            status=0
            wait "${pids[index]}" || status=$?
            if [ "$status" -ne 0 ]; then
                echo "error: ${names[index]} failed with exit status $status" >&2
                stop_commands
                print_end_of_log "$index" >&2
                return "$status"
            fi
            is_finished[index]=yes
        done
        if [ "$num_running" -eq 0 ]; then break; fi
        print_headlines
        sleep 1
    done
}

# Prints the last headline (see `step`) in the log of each command that is running, once. If a
# command writes to the terminal, that one shows what happens, and nothing is printed.
print_headlines() {
    local index headline
    for index in "${!pids[@]}"; do
        if [ -z "${is_finished[index]}${logs[index]}" ]; then return; fi
    done
    for index in "${!pids[@]}"; do
        if [ -n "${is_finished[index]}" ]; then continue; fi
        headline=$(sed -n 's/^== //p' "${logs[index]}" | tail -n 1)
        if [ "$headline" != "${headlines[index]}" ]; then
            echo "${names[index]} is at $headline"
            headlines[index]=$headline
        fi
    done
}

# print_end_of_log INDEX: prints the last lines of a command's log and the path of the log. Progress
# bars are lines of their own.
print_end_of_log() {
    local log=${logs[$1]}
    if [ -z "$log" ]; then
        echo "The output of ${names[$1]} is above."
        return
    fi
    LC_ALL=C tr '\r' '\n' < "$log" | LC_ALL=C sed '/^ *$/d' | tail -n 20
    echo "Those are the last lines of $log, which has the whole output of ${names[$1]}."
}

# Ends the commands that are running. A training that gets SIGTERM writes a checkpoint, from which
# the next run continues. A second signal to this script kills the commands at once.
stop_commands() {
    local deadline=$((SECONDS + GRACE))
    if ! signal_commands 0; then return; fi
    trap 'signal_commands KILL || true' HUP INT PIPE TERM
    signal_commands TERM || true
    # After SIGHUP there is no terminal to write to.
    echo "Ending what is running; a training writes a checkpoint first" >&2 || true
    while signal_commands 0 && [ "$SECONDS" -lt "$deadline" ]; do
        sleep 0.2
    done
    signal_commands KILL || true
}

# signal_commands SIGNAL: sends a signal to all processes of the commands that have not finished.
# The exit status is 0 if there are any. Signal 0 has no effect.
signal_commands() {
    local index status=1
    for index in "${!pids[@]}"; do
        if [ -n "${is_finished[index]}" ]; then continue; fi
        if kill -s "$1" -- "-${pids[index]}" 2> /dev/null; then status=0; fi
    done
    return "$status"
}
