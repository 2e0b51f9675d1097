"""Leave out rows whose answer says that the question cannot be answered.

    python -m data.filter_unanswerable --data_path A.json --output_path B.json
    python -m data.filter_unanswerable --data_path A.json --output_path B.json --rule original

Notable:
- `--rule original` drops a row whose lower-cased answer has one of the original's 27 phrases. "enough", "sorry" and
  "unclear" are among them, so "loud enough to be heard outdoors" and "she says that she is sorry" go too.
- The default, `refusal`, drops of these only what has words of refusal: a phrase must be about information, or about
  determining something, and not be what somebody in the clip says. "I cannot hear any dog, only traffic" stays: it is
  an answer about the sound. Of what the original keeps it drops nothing but answers that are, as a whole, "I'm not
  sure." or the like.
- The numbers of both rules are shown and recorded, whichever is used. `--dropped_path` keeps what was dropped.
"""

import re
from contextlib import nullcontext
from pathlib import Path

from data.command_line import command_parser
from data.provenance import audio_root_of, write_provenance, write_rows
from ltu.data.dataset_files import RowWriter, encode_row, stream_rows
from ltu.files import run_command

ORIGINAL = """cannot determine|not provided|cannot be determined|sorry|i cannot|without more information
enough information|not possible|more context|enough|impossible|without additional information|unclear|cannot|not clear
do not provide sufficient|does not provide|difficult to determine|no information provided|can't infer
difficult to infer|not specified|no specific|no information|without additional|it is difficult to|no indication"""
PHRASES = re.split(r"[|\n]", ORIGINAL)
# "enough information" is in a text only if "enough" is: these decide.
DECIDING = [
    phrase
    for phrase in PHRASES
    if not any(other != phrase and other in phrase for other in PHRASES)
]
FINDING_OUT = (
    "(?:accurately |definitively |reliably |exactly |directly )?(?:determin|infer|identif|tell|say\\b|know|specif|"
    "conclu|confirm|assess|ascertain|answer|judg|deduc|pinpoint|establish)"
)
FACTS = "(?:information|context|detail|data|evidence|clue)"
MORE = "(?:(?:any|clear|specific|additional|further|more|other|such|explicit|direct|enough|sufficient) ){0,3}"
SERVING = "(?:provid|give|offer|access|listen|process|play|analy[sz]e|perceive|describe|comment|help with|assist)"
REFUSAL = re.compile(
    "|".join(
        [
            f"cannot (?:be )?{FINDING_OUT}",
            f"can't {FINDING_OUT}",
            f"i cannot (?:{SERVING}|hear (?:the |this |your )?(?:audio|clip|recording))",
            "(?:^|[.!] |i'm |i am )(?:very |so )?sorry(?:,|\\.| but | i | as an )",
            f"(?:n't|\\bnot) (?:provid|giv|contain|hav|offer|includ|reveal)[a-z]* (?:[a-z]+ ){{0,3}}{FACTS}",
            f"(?:n't|\\b(?:not|without)) (?:[a-z]+ ){{0,3}}enough (?:[a-z]+ )?(?:{FACTS}|to {FINDING_OUT})",
            f"\\b(?:no|without|lack of|lacks?|insufficient|needs?|requires?) {MORE}{FACTS}",
            "more (?:context|information) (?:is|would|are)",
            "not (?:explicitly |specifically )?(?:provided|specified)",
            f"(?:difficult|impossible|possible) (?:for me )?to {FINDING_OUT}",
            "no indication (?:of what|of who|of where|of which|as to|about|on )",
            "(?:unclear|not clear) (?:from|what|who|whether|if |why|how|where|which|based|without)",
            # Speech and sounds may be unclear to the ear; a reason or a place that is unclear is not known.
            "^the (?!speech|voice|words?|sound|audio|recording|singing|lyric|noise|pronunc)[^,.;]* unclear\\.?$",
        ]
    )
)
QUOTED = re.compile(r"""(?<!\w)(?:"[^"]*"|“[^”]*”|‘.*?’(?!\w)|'.*?'(?!\w))""")
REPORTED = re.compile(  # "The clerk says that no information ...": what is said is heard.
    r"\b(?:says|said|saying|tells|told|argues?|complains?|explains?|announces?|claims?|replies|replied|warns?)"
    r" (?:[a-z]+ ){0,3}?(?:that|how|he|she|they) (?:(?! but )[^.;])*"
)
HEDGE = (
    "(?:(?:i )?(?:do not|don't) know(?: the answer| that)?|(?:i(?:'m| am) )?not (?:sure|certain)|no idea|"
    "un(?:clear|known|answerable)|not clear|hard to (?:say|tell)|(?:i )?(?:can't|cannot) (?:say|tell)|n/a)"
)
WHOLE = re.compile(
    rf"(?:(?:it|that|this)(?:'s| is) |the answer is |i have |sorry, )?{HEDGE}(?:,? sorry)?[.!]?"
)
LONGEST_WHOLE = 40  # characters; longer answers need not be looked at


def _own_words(text: str) -> str:
    return REPORTED.sub("", QUOTED.sub("", text)).replace("’", "'")


def is_unanswerable(output: str, rule: str = "refusal") -> bool:
    """Whether an answer is dropped by a rule."""
    text = output.lower()
    if (
        rule == "refusal"
        and len(text) <= LONGEST_WHOLE
        and WHOLE.fullmatch(text.strip().replace("’", "'"))
    ):
        return True
    for phrase in DECIDING:
        if phrase in text:
            return rule == "original" or REFUSAL.search(_own_words(text)) is not None
    return False


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--dropped_path", type=Path, help="a file for the rows that are left out")
    parser.add_argument("--rule", choices=["refusal", "original"], default="refusal")
    args = parser.parse_args(argv)
    dropped = {"original": 0, "refusal": 0}
    has_rest = args.dropped_path is not None
    with (
        write_rows(args.output_path, [args.data_path]) as kept,
        RowWriter(args.dropped_path, [args.data_path, args.output_path])
        if has_rest
        else nullcontext() as rest,
    ):
        for row in stream_rows(args.data_path):
            output = row.get("output")
            output = output if isinstance(output, str) else ""
            found = {"original": is_unanswerable(output, "original")}
            is_asked = found["original"] or len(output) <= LONGEST_WHOLE  # Others `refusal` keeps.
            found["refusal"] = is_asked and is_unanswerable(output)
            dropped = {rule: number + found[rule] for rule, number in dropped.items()}
            if not found[args.rule]:
                kept.write(encode_row(row))
            elif has_rest:
                rest.write(encode_row(row))
    total = kept.count + dropped[args.rule]
    facts = {"rule": args.rule, "rows": total, "dropped": dropped} | audio_root_of(
        args.output_path, [args.data_path]
    )
    write_provenance(args.output_path, "filter_unanswerable", [args.data_path], **facts)
    print(f"{args.output_path}: {kept.count:,} of {total:,} rows")
    for rule, number in dropped.items():
        used = "dropped" if rule == args.rule else "not used"
        print(f"  rule {rule}: {number:,} rows ({100 * number / max(1, total):.1f} %), {used}")
    return 0


if __name__ == "__main__":
    run_command(main)
