"""Tests the store of replies: its lock, half a line of a killed run, full disks, other files."""

import errno
import os
from dataclasses import replace

import pytest

from qa_generation.llm import (
    Reply,
    ReplyStore,
)

REPLY = Reply("é", "stop", "m", prompt_tokens=1, completion_tokens=2)


def test_store_is_locked_and_removes_half_a_line(tmp_path):
    path = tmp_path / "s"
    with ReplyStore(path) as store:
        store.put("ab", REPLY)
        with pytest.raises(ValueError, match="Another run"):
            ReplyStore(path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-5])
    with ReplyStore(path) as store:
        assert store.get("ab") == REPLY and store.get("cd") is None and store.tokens == 3
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"{}\n")
    with pytest.raises(ValueError, match=f"byte {len(whole)}"):
        ReplyStore(path)


def test_another_file_is_no_store_of_replies(tmp_path):
    """A file with one line without an end is not half a reply, and stays as it is."""
    foreign, half = tmp_path / "qa.json", tmp_path / "half.jsonl"
    foreign.write_text('[{"audio_id": "a.wav"}]')
    with pytest.raises(ValueError, match="qa.json, byte 0"):
        ReplyStore(foreign)
    assert foreign.read_text() == '[{"audio_id": "a.wav"}]'
    half.write_text('{"key": "0a')
    with ReplyStore(half) as store:
        assert not store.offsets
    assert half.read_bytes() == b""


class FullDisk:
    """A file that takes `room` more bytes, the last write in part, and then none."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def refuse(self, *_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(self, data) -> int:
        if not self.room:
            self.refuse()
        count = self.file.write(bytes(data)[: self.room])
        self.room -= count
        return count


def test_store_on_a_full_disk(tmp_path):
    """Half a line is removed; replies before and after it stay at their offsets."""
    path = tmp_path / "s"
    with ReplyStore(path) as store:
        store.put("aa", REPLY)
        whole = path.read_bytes()
        real, store.file = store.file, FullDisk(store.file, 20)
        with pytest.raises(OSError, match=f"{path}.*No space left|No space left.*{path}"):
            store.put("bb", REPLY)
        assert store.get("bb") is None and store.get("aa") == REPLY and path.read_bytes() == whole
        # If half a line cannot be cut off now, it is cut off before the next line.
        store.file.room = 20
        store.file.truncate = store.file.refuse
        with pytest.raises(OSError):
            store.put("bb", REPLY)
        store.file = real
        store.put("cc", replace(REPLY, text="later"))
        assert store.get("cc").text == "later" and store.get("aa") == REPLY and store.tokens == 6
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 2
    with ReplyStore(path) as store:
        assert len(store.offsets) == 2 and store.get("cc").text == "later"
        os.truncate(path, len(whole) + 9)
        with pytest.raises(ValueError, match=f"byte {len(whole)}: a reply is gone"):
            store.get("cc")
