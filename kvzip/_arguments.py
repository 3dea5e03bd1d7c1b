# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What the command line takes: the parser of ``kvzip COMMAND``, and the kinds of its arguments."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from kvzip.bounds import BoundPolicy
from kvzip.calibration import parse_bounds
from kvzip.errors import KvzipError
from kvzip.types import ErrorBound

_MODE = "default: rice where bounds differ within pages, else fixed"

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def build_parser() -> argparse.ArgumentParser:
    """The parser; what it makes names the command in ``command``."""
    parser = argparse.ArgumentParser(prog="kvzip", description="Compressed KV-cache swap.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_demo, _bench, _plan, _verify, _calibrate, _info, _inspect, _completion):
        add(commands)
    return parser


def _demo(commands: _Commands) -> None:
    parser = commands.add_parser("demo", help="store, overwrite, load and verify a KV cache")
    _add_input(parser)
    parser.add_argument(
        "--bound",
        type=_bound,
        help="1e-3 (relative to each page's range), abs:1e-2, rms:0.17 (of each token), lossless, table:FILE "
        f"(calibration table), or by kind of page: k=BOUND,v=BOUND,sink=BOUND; default {BoundPolicy.uncalibrated()}",
    )
    parser.add_argument("--mode", help=f"encoding mode: fixed, plain, outlier or rice; {_MODE}")
    parser.add_argument(
        "--budget", type=size, metavar="BYTES", help="bytes of the host pool, such as 64MiB; default: all fits"
    )


def _bench(commands: _Commands) -> None:
    parser = commands.add_parser("bench", help="speed of stores and loads on a KV cache, verified")
    _add_input(parser)
    parser.add_argument(
        "--bound",
        type=_bound,
        action="append",
        metavar="BOUND",
        help="as for demo; may be given several times; default: that of demo, 1e-3, 1e-2 and lossless",
    )
    parser.add_argument(
        "--mib", type=int, metavar="N", help="raw MiB of the largest transfer; default 16 on the host, 256 on a GPU"
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions of 4 MiB: whether it works")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the results to a file as well")
    _add_plot(parser, "bandwidth against size")


def _plan(commands: _Commands) -> None:
    parser = commands.add_parser("plan", help="what a host pool holds and its transfers take, for a model and a link")
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG", help="config.json of a model of Hugging Face, or its folder"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="layers that keep keys and values")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="heads of K, and of V")
    parser.add_argument("--head-dim", type=int, metavar="N", help="values of one head and token")
    parser.add_argument("--dtype", metavar="DTYPE", help="of the cache: bfloat16, float16 or float32; default bfloat16")
    parser.add_argument(
        "--parameters", type=float, metavar="N", help="parameters that a token passes through, such as 8e9"
    )
    parser.add_argument(
        "--prefill-tokens-per-s", type=float, metavar="N", help="speed of a prefill, where it was measured"
    )
    parser.add_argument(
        "--budget", type=size, default="16GiB", metavar="BYTES", help="bytes of the host pool; default 16GiB"
    )
    parser.add_argument(
        "--link-gb-per-s", type=float, metavar="N", help="1e9 bytes a second of one large copy; default: a measured one"
    )
    parser.add_argument("--bound", type=_bound, help="as for demo")
    parser.add_argument("--mode", help=f"encoding mode; {_MODE}")
    parser.add_argument(
        "--ratio", type=float, metavar="R", help="raw bytes over encoded bytes; default: measured on --input"
    )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE.npy",
        help="KV cache to measure the ratio on, as for demo; default: a sample",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 8192, 32768, 131072], metavar="N", help="lengths of sequences"
    )
    _add_plot(parser, "the time against the length")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _info(commands: _Commands) -> None:
    parser = commands.add_parser("info", help="what this installation can do")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _inspect(commands: _Commands) -> None:
    parser = commands.add_parser("inspect", help="show the header of a record")
    parser.add_argument("file", type=Path, metavar="FILE", help="a file that holds one record")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _calibrate(commands: _Commands) -> None:
    parser = commands.add_parser("calibrate", help="measure a model's queries: a table of bounds for its keys")
    _model_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="TABLE", help="file to write, .npz or .json")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="most tokens of a text; default 2048")
    parser.add_argument(
        "--gradients", action="store_true", help="weigh channels and layers by what they do to the output; more memory"
    )
    parser.add_argument(
        "--fit",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="choose t and r on these other texts, so that the output stays as close as with fp8; some minutes",
    )


def _verify(commands: _Commands) -> None:
    parser = commands.add_parser(
        "verify", help="check this build on this machine; with --model, what a scheme does to a model's output"
    )
    _model_options(parser, required=False)
    parser.add_argument(
        "--bound",
        type=_named_bound,
        action="append",
        default=[],
        help="error bounds as for demo, such as table:FILE; may be repeated; default: that of demo",
    )
    parser.add_argument("--mode", help=f"encoding mode; {_MODE}")
    parser.add_argument("--block-tokens", type=int, default=16, metavar="N", help="tokens of one block; default 16")
    parser.add_argument(
        "--prefix", type=int, default=1536, metavar="N", help="tokens whose cache is swapped; default 1536"
    )
    parser.add_argument("--continuation", type=int, default=512, metavar="N", help="tokens behind it; default 512")
    _add_plot(parser, "ratio against fidelity")


def _completion(commands: _Commands) -> None:
    parser = commands.add_parser("completion", help="print a script that completes kvzip's arguments in a shell")
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")


def _add_input(parser: argparse.ArgumentParser) -> None:
    """What ``demo`` and ``bench`` share."""
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE.npy",
        help="uint16 views of bf16, shape [layers, 2, tokens, kv_heads, head_dim]; default: a small real sample",
    )
    parser.add_argument("--codec", default="cuszp", help="name of the codec; default cuszp")
    parser.add_argument("--block-tokens", type=int, default=16, metavar="N", help="tokens of one block; default 16")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the pages lie; default auto"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="most host threads; default 0, all cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_plot(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw {what} into a .png, .svg or .pdf file")


def _model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """What the commands that run a model share."""
    parser.add_argument(
        "--model", required=required, metavar="MODEL", help="folder, GGUF file, or name of the Hugging Face hub"
    )
    parser.add_argument("--text", type=Path, nargs="+", required=required, metavar="FILE", help="texts, UTF-8")
    parser.add_argument("--device", default="auto", help="torch device of the model; default auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _named_bound(text: str) -> tuple[str, ErrorBound | BoundPolicy]:
    return text, _bound(text)


def _bound(text: str) -> ErrorBound | BoundPolicy:
    try:
        return parse_bounds(text)
    except (KvzipError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> int:
    """Bytes of a text such as ``64MiB``."""
    units = {
        "": 1,
        "B": 1,
        "KIB": 1 << 10,
        "MIB": 1 << 20,
        "GIB": 1 << 30,
        "TIB": 1 << 40,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
    }
    number = text.rstrip("kKmMgGtTiIbB")
    unit = text[len(number) :].upper()
    try:
        value = float(number) * units[unit]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: use bytes, or a number with KiB, MiB or GiB") from None
    if not (math.isfinite(value) and value >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: use at least one byte")
    return int(value)
