"""Converts released files and pretrained components into a checkpoint folder of LTU-AS.

    python -m ltu_as.convert_checkpoint --llm LLM --checkpoint FILE_OR_DIR --output_dir DIR
    python -m ltu_as.convert_checkpoint --init --llm LLM --audio_encoder FILE --output_dir DIR
    python -m ltu_as.convert_checkpoint --init --llm LLM --whisper FILE.pt --output_dir DIR
    python -m ltu_as.convert_checkpoint --model DIR --to_original FILE.bin
    python -m ltu_as.convert_checkpoint --model DIR --merge --output_dir DIR
    python -m ltu_as.convert_checkpoint --model DIR --merged_llm_dir DIR

LLM is a folder or a hub id. `--audio_encoder` takes TLTR from a Whisper-AT file of the full width
("ori"), such as whisper_at_large_v1.pth, from a file of `ltu_as.pretrain_tltr`, or from a released
folder, such as vicuna_ltuas. Without it, TLTR is initialised at random, with a warning.
"""

from functools import partial

import ltu.convert_checkpoint
from ltu.files import run_command
from ltu_as.converter import LtuAsConverter

main = partial(ltu.convert_checkpoint.main, converter_class=LtuAsConverter)

if __name__ == "__main__":
    run_command(main)
