"""Removes examples whose answer says that the question cannot be answered.

    python -m data.filter_unanswerable --data_path A.json --output_path B.json
    python -m data.filter_unanswerable --data_path A.json --output_path B.json --rule original

`--rule original` drops an example if its answer, in lower case, contains one of the original's 27
phrases. "enough", "sorry" and "unclear" are among them, so that "loud enough to disturb the
neighbours" and "she says that she is sorry" are dropped too.

The default, `--rule refusal`, drops only those of them that express a refusal: a phrase must be
about information or about determining something, and must not be what somebody in the clip says.
"I cannot make out any dog, only traffic" is not dropped: it is an answer about the sound. Of the
examples without a phrase of the original, this rule drops only answers that consist of nothing but
"I'm not sure." or the like.

The counts of both rules are printed and recorded, whichever is used. `--dropped_path` writes the
dropped examples.
"""

import re
from contextlib import nullcontext
from pathlib import Path

from data.command_line import add_audio_root, command_parser, source_of
from data.embedded_clips import add_embed_flags, make_embedder, reader_of, resolve_ids
from data.provenance import clip_facts, files_of, write_examples, write_provenance
from ltu.data.columns import read_column_flags
from ltu.data.dataset_io import ExampleWriter, encode_line, typed_examples
from ltu.files import run_command

# The phrases of the original, in its order.
PHRASES = [
    "cannot determine",
    "not provided",
    "cannot be determined",
    "sorry",
    "i cannot",
    "without more information",
    "enough information",
    "not possible",
    "more context",
    "enough",
    "impossible",
    "without additional information",
    "unclear",
    "cannot",
    "not clear",
    "do not provide sufficient",
    "does not provide",
    "difficult to determine",
    "no information provided",
    "can't infer",
    "difficult to infer",
    "not specified",
    "no specific",
    "no information",
    "without additional",
    "it is difficult to",
    "no indication",
]


def _contains_another(phrase: str) -> bool:
    return any(other in phrase for other in PHRASES if other != phrase)


# A text that contains "enough information" contains "enough" too: only the phrases that contain no
# other phrase need to be searched.
DECIDING = [phrase for phrase in PHRASES if not _contains_another(phrase)]

# Parts of the pattern of a refusal.
FINDING_OUT = (
    "(?:accurately |definitively |reliably |exactly |directly )?"
    "(?:determin|infer|identif|tell|say\\b|know|specif|conclu|confirm|assess|ascertain|answer|judg|"
    "deduc|pinpoint|establish)"
)
FACTS = "(?:information|context|detail|data|evidence|clue)"
MORE = (
    "(?:(?:any|clear|specific|additional|further|more|other|such|explicit|direct|enough|sufficient)"
    " ){0,3}"
)
SERVING = (
    "(?:provid|give|offer|access|listen|process|play|analy[sz]e|perceive|describe|comment|"
    "help with|assist)"
)
REFUSAL = re.compile(
    "|".join(
        [
            f"cannot (?:be )?{FINDING_OUT}",
            f"can't {FINDING_OUT}",
            f"i cannot (?:{SERVING}|hear (?:the |this |your )?(?:audio|clip|recording))",
            "(?:^|[.!] |i'm |i am )(?:very |so )?sorry(?:,|\\.| but | i | as an )",
            "(?:n't|\\bnot) (?:provid|giv|contain|hav|offer|includ|reveal)[a-z]* "
            f"(?:[a-z]+ ){{0,3}}{FACTS}",
            "(?:n't|\\b(?:not|without)) (?:[a-z]+ ){0,3}enough (?:[a-z]+ )?"
            f"(?:{FACTS}|to {FINDING_OUT})",
            f"\\b(?:no|without|lack of|lacks?|insufficient|needs?|requires?) {MORE}{FACTS}",
            "more (?:context|information) (?:is|would|are)",
            "not (?:explicitly |specifically )?(?:provided|specified)",
            f"(?:difficult|impossible|possible) (?:for me )?to {FINDING_OUT}",
            "no indication (?:of what|of who|of where|of which|as to|about|on )",
            "(?:unclear|not clear) (?:from|what|who|whether|if |why|how|where|which|based|without)",
            # "The speech is unclear" describes a sound; "the reason is unclear" is a refusal.
            "^the (?!speech|voice|words?|sound|audio|recording|singing|lyric|noise|pronunc)"
            "[^,.;]* unclear\\.?$",
        ]
    )
)
QUOTED = re.compile(r"""(?<!\w)(?:"[^"]*"|“[^”]*”|‘.*?’(?!\w)|'.*?'(?!\w))""")
# "The clerk says that no information ...": reported speech is content of the clip.
REPORTED = re.compile(
    r"\b(?:says|said|saying|tells|told|argues?|complains?|explains?|announces?|claims?|replies|"
    r"replied|warns?)"
    r" (?:[a-z]+ ){0,3}?(?:that|how|he|she|they) (?:(?! but )[^.;])*"
)
HEDGE = (
    "(?:(?:i )?(?:do not|don't) know(?: the answer| that)?|(?:i(?:'m| am) )?not (?:sure|certain)|"
    "no idea|un(?:clear|known|answerable)|not clear|hard to (?:say|tell)|"
    "(?:i )?(?:can't|cannot) (?:say|tell)|n/a)"
)
# An answer that consists of nothing but a hedge.
WHOLE = re.compile(
    rf"(?:(?:it|that|this)(?:'s| is) |the answer is |i have |sorry, )?{HEDGE}(?:,? sorry)?[.!]?"
)
LONGEST_WHOLE = 40  # Characters; no longer answer matches WHOLE.


def _own_words(text: str) -> str:
    """Return an answer without what it quotes or reports."""
    return REPORTED.sub("", QUOTED.sub("", text)).replace("’", "'")


def is_unanswerable(output: str, rule: str = "refusal") -> bool:
    """Return whether a rule, "refusal" or "original", drops an answer."""
    text = output.lower()
    if rule == "refusal" and len(text) <= LONGEST_WHOLE:
        if WHOLE.fullmatch(text.strip().replace("’", "'")):
            return True
    if not any(phrase in text for phrase in DECIDING):
        return False
    return rule == "original" or REFUSAL.search(_own_words(text)) is not None


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--dropped_path", type=Path, help="A dataset file for the examples that are dropped."
    )
    parser.add_argument(
        "--rule",
        choices=["refusal", "original"],
        default="refusal",
        help="The rule that drops examples (default: refusal).",
    )
    add_audio_root(parser)
    add_embed_flags(parser)
    args = parser.parse_args(argv)
    columns = read_column_flags(args)
    source = source_of(args)
    embedder = make_embedder(args, [source])
    num_dropped = {"original": 0, "refusal": 0}
    if args.dropped_path is None:
        dropped_writer = nullcontext()
    else:
        dropped_writer = ExampleWriter(args.dropped_path, [*files_of([source]), args.output_path])
    writer = write_examples(args.output_path, [source], reader_of(embedder))
    with writer as remaining, dropped_writer as dropped:
        examples = typed_examples(source, columns)
        for example in resolve_ids(embedder, examples, source):
            output = example.get("output")
            if not isinstance(output, str):
                output = ""
            is_dropped = {"original": is_unanswerable(output, "original"), "refusal": False}
            # The rule `refusal` drops nothing else, so the search is only done for these.
            if is_dropped["original"] or len(output) <= LONGEST_WHOLE:
                is_dropped["refusal"] = is_unanswerable(output)
            for rule in num_dropped:
                num_dropped[rule] += is_dropped[rule]
            if not is_dropped[args.rule]:
                remaining.write(encode_line(example))
            elif dropped is not None:
                dropped.write(encode_line(example))

    # Record and print the counts of both rules.
    total = remaining.count + num_dropped[args.rule]
    facts = {"rule": args.rule, "num_examples": total, "dropped": num_dropped}
    facts |= clip_facts(args, args.output_path, [source], columns)
    write_provenance(args.output_path, "filter_unanswerable", [source], **facts)
    print(f"{args.output_path}: {remaining.count:,} of {total:,} examples")
    for rule, number in num_dropped.items():
        used = "dropped" if rule == args.rule else "not used"
        print(f"  rule {rule}: {number:,} examples ({100 * number / max(1, total):.1f} %), {used}")
    return 0


if __name__ == "__main__":
    run_command(main)
