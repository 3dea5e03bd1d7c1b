# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The command line, ``kvzip COMMAND``.

Results go to stdout, progress and errors to stderr. Exit status: 0 = all holds, 1 = a check failed (a bound is
violated, other bytes were written, a scheme is worse than fp8), 2 = unusable arguments or input.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvzip._log import logger
from kvzip.backends.registry import get_codec
from kvzip.bounds import BoundPolicy
from kvzip.calibration import parse_bounds
from kvzip.errors import BackendUnavailableError, ConfigError, KvzipError
from kvzip.record import Coding, Reason, RecordHeader, Steps, read_header, read_record
from kvzip.types import DType, ErrorBound


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit status.
    """
    arguments = _parser().parse_args(argv)
    warnings = logging.StreamHandler()  # to stderr
    warnings.setFormatter(logging.Formatter("kvzip: %(message)s"))
    logger.addHandler(warnings)
    try:
        status: int = arguments.run(arguments)
    except (KvzipError, OSError) as error:
        print(f"kvzip: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"kvzip: out of memory ({error}): use a smaller input, block or budget", file=sys.stderr)
        return 2
    finally:
        logger.removeHandler(warnings)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvzip", description="Compressed KV-cache swap.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="store, overwrite, load and verify a KV cache")
    _add_input(demo)
    demo.add_argument(
        "--bound",
        type=_bound,
        default="1e-3",
        help="1e-3 (relative to each page's range), abs:1e-2, rms:0.17 (of each token), lossless, table:FILE:0.4 "
        "(calibration table), or by kind of page: k=BOUND,v=BOUND,sink=BOUND; default 1e-3",
    )
    demo.add_argument("--mode", help="encoding mode: fixed, plain, outlier or rice; default: the codec's first")
    demo.add_argument(
        "--budget", type=_bytes, metavar="BYTES", help="bytes of the host pool, such as 64MiB; default: all fits"
    )
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="speed of stores and loads on a KV cache, verified")
    _add_input(bench)
    bench.add_argument(
        "--bound",
        type=_bound,
        action="append",
        metavar="BOUND",
        help="as for demo; may be given several times; default 1e-3, 1e-2 and lossless",
    )
    bench.add_argument(
        "--mib", type=int, metavar="N", help="raw MiB of the largest transfer; default 16 on the host, 256 on a GPU"
    )
    bench.add_argument("--quick", action="store_true", help="few repetitions of 4 MiB: whether it works")
    bench.add_argument("--out", type=Path, metavar="FILE.json", help="write the results to a file as well")
    _add_plot(bench, "bandwidth against size")
    bench.set_defaults(run=_bench)

    plan = commands.add_parser("plan", help="what a host pool holds and its transfers take, for a model and a link")
    plan.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG", help="config.json of a model of Hugging Face, or its folder"
    )
    plan.add_argument("--layers", type=int, metavar="N", help="layers that keep keys and values")
    plan.add_argument("--kv-heads", type=int, metavar="N", help="heads of K, and of V")
    plan.add_argument("--head-dim", type=int, metavar="N", help="values of one head and token")
    plan.add_argument("--dtype", metavar="DTYPE", help="of the cache: bfloat16, float16 or float32; default bfloat16")
    plan.add_argument(
        "--parameters", type=float, metavar="N", help="parameters that a token passes through, such as 8e9"
    )
    plan.add_argument(
        "--prefill-tokens-per-s", type=float, metavar="N", help="speed of a prefill, where it was measured"
    )
    plan.add_argument(
        "--budget", type=_bytes, default="16GiB", metavar="BYTES", help="bytes of the host pool; default 16GiB"
    )
    plan.add_argument(
        "--link-gb-per-s", type=float, metavar="N", help="1e9 bytes a second of one large copy; default: a measured one"
    )
    plan.add_argument("--bound", type=_bound, default="1e-3", help="as for demo; default 1e-3")
    plan.add_argument("--mode", help="encoding mode; default: the codec's first")
    plan.add_argument(
        "--ratio", type=float, metavar="R", help="raw bytes over encoded bytes; default: measured on --input"
    )
    plan.add_argument(
        "--input",
        type=Path,
        metavar="FILE.npy",
        help="KV cache to measure the ratio on, as for demo; default: a sample",
    )
    plan.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 8192, 32768, 131072], metavar="N", help="lengths of sequences"
    )
    _add_plot(plan, "the time against the length")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_plan)

    info = commands.add_parser("info", help="what this installation can do")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    inspect = commands.add_parser("inspect", help="show the header of a record")
    inspect.add_argument("file", type=Path, metavar="FILE", help="a file that holds one record")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)

    calibrate = commands.add_parser("calibrate", help="measure a model's queries: a table of bounds for its keys")
    _model_options(calibrate)
    calibrate.add_argument("--out", type=Path, required=True, metavar="TABLE", help="file to write, .npz or .json")
    calibrate.add_argument("--tokens", type=int, default=2048, metavar="N", help="most tokens of a text; default 2048")
    calibrate.add_argument(
        "--gradients", action="store_true", help="weigh channels and layers by what they do to the output; more memory"
    )
    calibrate.set_defaults(run=_calibrate)

    verify = commands.add_parser(
        "verify", help="check this build on this machine; with --model, what a scheme does to a model's output"
    )
    _model_options(verify, required=False)
    verify.add_argument(
        "--bound",
        type=_named_bound,
        action="append",
        default=[],
        help="error bounds as for demo, such as table:FILE:0.4; may be repeated; default: the engine's",
    )
    verify.add_argument("--mode", help="encoding mode; default: the codec's first")
    verify.add_argument("--block-tokens", type=int, default=16, metavar="N", help="tokens of one block; default 16")
    verify.add_argument(
        "--prefix", type=int, default=1536, metavar="N", help="tokens whose cache is swapped; default 1536"
    )
    verify.add_argument("--continuation", type=int, default=512, metavar="N", help="tokens behind it; default 512")
    _add_plot(verify, "ratio against fidelity")
    verify.set_defaults(run=_verify)

    completion = commands.add_parser("completion", help="print a script that completes kvzip's arguments in a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")
    completion.set_defaults(run=_completion)
    return parser


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


def _bytes(text: str) -> int:
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


def _progress(of: str) -> Callable[[str, int, int], None]:
    """A line on stderr where that is a terminal."""

    def show(stage: str, done: int, total: int) -> None:
        print(f"\r{stage:>14} {done}/{total} {of}", end="" if done < total else "\n", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else lambda stage, done, total: None


def _demo(arguments: argparse.Namespace) -> int:
    from kvzip import demo

    result = demo.run(
        arguments.input,
        bound=arguments.bound,
        codec=arguments.codec,
        mode=arguments.mode,
        block_tokens=arguments.block_tokens,
        budget_bytes=arguments.budget,
        device=arguments.device,
        threads=arguments.threads,
        progress=_progress("blocks"),
    )
    if arguments.json:
        print(_json(result.as_dict()))
    else:
        print(_table(_demo_rows(result.as_dict())))
    return 1 if result.violations else 0


def _demo_rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    lost = f", {r['evicted']} evicted under the budget" if r["evicted"] else ""
    return [
        ("stored", f"{r['blocks']} blocks{lost}"),
        ("raw", f"{r['raw_bytes']:,} bytes"),
        ("in the pool", f"{r['stored_bytes']:,} bytes, {r['pool_payload_fraction']:.1%} of its extents are payload"),
        ("ratio", f"{r['ratio']:.3f}"),
        ("codec", f"{r['codec']}, mode {r['mode']}, on {r['device']}"),
        ("bound", f"{r['bound']}"),
        ("largest error", f"{r['max_error']:.4g} ({r['max_error_over_bound']:.4f} of the bound of its page)"),
        ("violations", f"{r['violations']}"),
        ("store", f"{r['store_gb_per_s']:.2f} GB/s of raw data"),
        ("load", f"{r['load_gb_per_s']:.2f} GB/s of raw data"),
    ]


def _bench(arguments: argparse.Namespace) -> int:
    from kvzip import benchmark, plots

    _check_files(arguments.out, arguments.plot)
    result = benchmark.run(
        arguments.input,
        bounds=arguments.bound or [ErrorBound.parse(text) for text in ("1e-3", "1e-2", "lossless")],
        codec=arguments.codec,
        device=arguments.device,
        mib=arguments.mib,
        block_tokens=arguments.block_tokens,
        threads=arguments.threads,
        quick=arguments.quick,
        progress=_progress("cases"),
    )
    if arguments.out:
        benchmark.write_json(arguments.out, _plain(result))
    if arguments.plot:
        plots.save(plots.bandwidth, result, arguments.plot)
    if arguments.json:
        print(_json(result))
    else:
        print(_bench_table(result))
    return 1 if result["violations"] else 0


def _bench_table(result: dict[str, Any]) -> str:
    lines = [_table([*_flatten(result["environment"]), *_flatten(result["settings"])]), ""]
    for row in result["rows"]:
        efficiency = f"  {row['efficiency']:.2f} of ratio x link" if row["efficiency"] else ""
        lines.append(
            f"{row['way']:<14} {row['direction']:<3} {row['blocks']:>5} blocks {row['raw_bytes'] / 2**20:>8.2f} MiB "
            f"ratio {row['ratio']:.3f} {row['gb_per_s']:>7.2f} GB/s {row['us']:>9.0f} us "
            f"[{row['us_p10']:.0f}, {row['us_p90']:.0f}]{efficiency}"
        )
    lines += [
        f"{row['codec']:<14} {row['op']} alone, {row['threads']} threads: ratio {row['ratio']:.3f} "
        f"{row['gb_per_s']:.2f} GB/s"
        for row in result["codec_rows"]
    ]
    return "\n".join([*lines, "", f"violations  {result['violations']}"])


def _plan(arguments: argparse.Namespace) -> int:
    from kvzip import demo, plots
    from kvzip.planner import Model, Plan, Rates

    _check_files(arguments.plot)
    numbers = {
        "layers": arguments.layers,
        "kv_heads": arguments.kv_heads,
        "head_dim": arguments.head_dim,
        "dtype": None if arguments.dtype is None else DType.parse(arguments.dtype),
        "parameters": arguments.parameters,
    }
    given = {name: value for name, value in numbers.items() if value is not None}
    missing = [f"--{name.replace('_', '-')}" for name in ("layers", "kv_heads", "head_dim") if name not in given]
    if arguments.config:
        model = replace(Model.from_config(arguments.config), **given)
    elif missing:
        raise ConfigError(f"{', '.join(missing)} not given: give the numbers of the model, or its config.json")
    else:
        model = Model(**given)
    rates = Rates.measured()
    if arguments.link_gb_per_s is not None:
        rates = rates.with_link(arguments.link_gb_per_s)
    mode = get_codec("cuszp").check_mode(arguments.mode or get_codec("cuszp").modes[0])
    ratio = arguments.ratio
    if ratio is None:
        ratio = demo.measure_ratio(arguments.input, bound=arguments.bound, mode=mode)
    plan = Plan(model, rates, arguments.budget, ratio, mode, arguments.prefill_tokens_per_s)
    result = {
        **plan.as_dict(arguments.tokens),
        "bound": str(arguments.bound).removeprefix("rel:"),
        "ratio_from": "given" if arguments.ratio is not None else str(arguments.input or "the sample of kvzip"),
    }
    if arguments.plot:
        lengths = sorted({int(10 ** (step / 10)) for step in range(10, 61)})  # 10 to a million
        plots.save(plots.break_even, {**result, "rows": [plan.row(tokens) for tokens in lengths]}, arguments.plot)
    print(_json(result) if arguments.json else _plan_table(result))
    return 0


def _plan_table(r: dict[str, Any]) -> str:
    from kvzip.planner import BREAK_EVENS

    model, held, each, link = r["model"], r["tokens_held"], r["bytes_per_token"], r["link_gb_per_s"]

    def tokens(count: int | None) -> str:
        return "never, or too little is known" if count is None else f"from {count:,} tokens on"

    def ms(seconds: float | None) -> str:
        return f"{'-':>10}" if seconds is None else f"{seconds * 1e3:>10,.2f}"

    lines = [
        _table(
            [
                (
                    "model",
                    f"{model['layers']} layers, {model['kv_heads']} KV heads of {model['head_dim']}, {model['dtype']}",
                ),
                ("bound", f"{r['bound']}, mode {r['mode']}: ratio {r['ratio']:.2f} ({r['ratio_from']})"),
                ("a token", f"{each['raw']:,} bytes raw, {each['encoded']:,.0f} encoded"),
                (
                    f"{r['budget_bytes'] / 2**30:,.1f} GiB hold",
                    f"{held['raw']:,} tokens raw, {held['encoded']:,} encoded",
                ),
                ("link", f"{link['out']:.1f} GB/s out, {link['in']:.1f} in"),
            ]
        ),
        "",
        f"{'ms for':>14} {'out, raw':>10} {'encoded':>10} {'in, raw':>10} {'encoded':>10} {'recompute':>10}",
    ]
    for row in r["rows"]:
        times = [row[f"{name}_{what}_seconds"] for name in ("store", "load") for what in ("raw", "encoded")]
        lines.append(f"{row['tokens']:>7,} tokens {' '.join(ms(t) for t in [*times, row['recompute_seconds']])}")
    return "\n".join(
        [
            *lines,
            "",
            _table([(BREAK_EVENS[name], tokens(at)) for name, at in r["break_even_tokens"].items()]),
            "",
            f"Rates of: {r['machine']}",
        ]
    )  # fmt: skip


def _info(arguments: argparse.Namespace) -> int:
    from kvzip.info import system_info

    info = system_info()
    if arguments.json:
        print(_json(info, indent=2))
    else:
        print(_table(list(_flatten(info))))
    return 0


def _flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += _flatten(item, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, ", ".join(map(str, item)) if isinstance(item, list) else str(item)))
    return rows


def _inspect(arguments: argparse.Namespace) -> int:
    data = arguments.file.read_bytes()
    header = read_header(data)
    read_record(data)
    if arguments.json:
        print(_json(_header_dict(header)))
    else:
        print(_table(list(_flatten(_header_dict(header)))))
    return 0


def _header_dict(header: RecordHeader) -> dict[str, Any]:
    coding: Counter[int] = Counter(header.table["coding"].tolist())
    reason: Counter[int] = Counter(header.table["reason"].tolist())
    names = {
        int(c) | int(s): c.name.lower() + ("" if s is Steps.PAGE else f" by {s.name.lower()}")
        for c in Coding
        for s in Steps
    }
    return {
        "format_version": header.version,
        "codec": header.codec,
        "mode": header.mode,
        "bound": str(header.bound),
        **({"table_id": f"{header.table_id:016x}"} if header.table_id else {}),
        "reason": header.reason.name.lower(),
        "max_error": header.max_error,
        "raw_bytes": header.raw_bytes,
        "record_bytes": header.record_bytes,
        "header_bytes": header.header_bytes,
        "ratio": round(header.ratio, 4),
        "dims": header.dims,
        "pages": header.num_segments,
        "geometry": [
            f"{g.count} x ({g.tokens} tokens, {g.heads} heads, {g.head_dim}) {g.dtype.name.lower()}, "
            f"groups of {g.group_tokens} tokens"
            for g in header.geometry
        ],
        "codings": {names.get(k, str(k)): n for k, n in sorted(coding.items())},
        "reasons": {Reason(k).name.lower(): n for k, n in sorted(reason.items())},
        "largest_applied_bound": float(header.table["bound"].max()),
        "payload_crc32c": f"{header.payload_crc32c:08x}",
    }


def _calibrate(arguments: argparse.Namespace) -> int:
    from kvzip.adapters.transformers.models import load_model
    from kvzip.adapters.transformers.moments import calibrate

    texts = list(_texts(arguments.text).values())
    _check_files(arguments.out)
    model = load_model(arguments.model, device=arguments.device)
    table = calibrate(model, texts, max_tokens=arguments.tokens, progress=_progress("texts"))
    if arguments.gradients:
        from kvzip.adapters.transformers.gradients import weigh

        table = weigh(model, table, "\n".join(texts), max_tokens=arguments.tokens)
    table.save(arguments.out)
    layers, heads, head_dim = table.geometry
    found = {
        "model": table.model,
        "layers": layers,
        "kv_heads": heads if table.is_uniform else [h for h, _ in table.shapes],
        "head_dim": head_dim if table.is_uniform else [d for _, d in table.shapes],
        "tokens": table.tokens,
        "table": str(arguments.out),
    }
    print(_json(found) if arguments.json else _table([(name, str(value)) for name, value in found.items()]))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.model:
        return _verify_model(arguments)
    if arguments.text or arguments.bound or arguments.mode or arguments.plot:
        raise ConfigError("--text, --bound, --mode and --plot are for a model: give --model, or none of them")
    from kvzip import selfcheck

    result = selfcheck.run(arguments.device, _progress("cases"))
    if arguments.json:
        print(_json(result))
    else:
        print(
            _table(
                [
                    ("library", result["native"]),
                    ("ways", "; ".join(result["ways"])),
                    ("cases", f"{len(result['cases'])}, each in every way"),
                    ("golden set", f"{sum(case['golden'] for case in result['cases'])} agree"),
                    ("other bytes", f"{sum(len(case['differ']) for case in result['cases'])}"),
                    ("violations", f"{result['violations']}"),
                ]
            )
        )
        for failure in result["failures"]:
            print(f"failed: {failure}")
    return 1 if result["failures"] else 0


def _verify_model(arguments: argparse.Namespace) -> int:
    from kvzip import plots
    from kvzip.adapters.transformers import fidelity, schemes
    from kvzip.adapters.transformers.models import load_model

    if not arguments.text:
        raise ConfigError("--text not given: give texts to run the model on")
    _check_files(arguments.plot)
    texts = _texts(arguments.text)
    chosen = {"mode": arguments.mode, "block_tokens": arguments.block_tokens}
    own = [schemes.engine_scheme(name, bound, **chosen) for name, bound in arguments.bound or [("default", None)]]
    model = load_model(arguments.model, device=arguments.device)
    result = fidelity.evaluate(
        model,
        texts,
        [*schemes.peers(), *own],
        prefix=arguments.prefix,
        continuation=arguments.continuation,
        progress=_progress("steps"),
    )
    worse = result.worse()
    found = {**result.as_dict(), "limit": result.limit(), "worse": worse}
    if arguments.plot:
        plots.save(plots.fidelity, found, arguments.plot)
    if arguments.json:
        print(_json(found))
    else:
        print(result.table())
        for name in worse:
            print(f"worse than fp8: {name}")
    return 1 if worse else 0


def _completion(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise BackendUnavailableError("completion needs shtab: pip install 'kvzip[completion]'") from error
    parser = _parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE
    print(shtab.complete(parser, shell=arguments.shell))
    return 0


def _check_files(*paths: Path | None) -> None:
    """Say that a file cannot be written before a long run, not after it."""
    for path in paths:
        if path and not path.resolve().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.resolve().parent}: make it, or choose another file")


def _texts(paths: Sequence[Path]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for path in paths:
        name = path.stem if path.stem not in texts else str(path)
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from error
    return texts


def _json(value: dict[str, Any], indent: int | None = None) -> str:
    """JSON proper: it has no infinity and no NaN, they become null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
