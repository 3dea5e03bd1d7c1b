# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The command line, ``kvzip COMMAND``.

Results go to stdout, progress and errors to stderr. Exit status: 0 = all holds, 1 = a check failed (a bound is
violated, other bytes were written, a scheme is worse than fp8), 2 = unusable arguments or input.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kvzip._arguments import build_parser
from kvzip._log import logger
from kvzip._text import bench_table, columns, demo_rows, flatten, header_fields, plain, plan_table, to_json
from kvzip.backends.registry import get_codec
from kvzip.errors import BackendUnavailableError, ConfigError, KvzipError
from kvzip.record import MAX_HEADER_BYTES, read_header, read_record
from kvzip.types import DType, ErrorBound


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit status.
    """
    arguments = build_parser().parse_args(argv)
    warnings = logging.StreamHandler()  # to stderr
    warnings.setFormatter(logging.Formatter("kvzip: %(message)s"))
    logger.addHandler(warnings)
    try:
        status = _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 2
    except KeyboardInterrupt:
        return 130  # as shells say it
    except (KvzipError, OSError) as error:
        print(f"kvzip: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"kvzip: out of memory ({error}): use a smaller input, block or budget", file=sys.stderr)
        return 2
    finally:
        logger.removeHandler(warnings)
    return status


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
        print(to_json(result.as_dict()))
    else:
        print(columns(demo_rows(result.as_dict())))
    return 1 if result.violations else 0


def _bench(arguments: argparse.Namespace) -> int:
    from kvzip import benchmark, plots

    _check_files(arguments.out, arguments.plot)
    result = benchmark.run(
        arguments.input,
        bounds=arguments.bound or [None, *map(ErrorBound.parse, ("1e-3", "1e-2", "lossless"))],
        codec=arguments.codec,
        device=arguments.device,
        mib=arguments.mib,
        block_tokens=arguments.block_tokens,
        threads=arguments.threads,
        quick=arguments.quick,
        progress=_progress("cases"),
    )
    if arguments.out:
        benchmark.write_json(arguments.out, plain(result))
    if arguments.plot:
        plots.save(plots.bandwidth, result, arguments.plot)
    if arguments.json:
        print(to_json(result))
    else:
        print(bench_table(result))
    return 1 if result["violations"] else 0


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
    codec = get_codec("cuszp")
    bound = codec.default_bound() if arguments.bound is None else arguments.bound
    mode = codec.check_mode(arguments.mode or codec.default_mode(bound))
    ratio = arguments.ratio
    if ratio is None:
        ratio = demo.measure_ratio(arguments.input, bound=bound, mode=mode)
    plan = Plan(model, rates, arguments.budget, ratio, mode, arguments.prefill_tokens_per_s)
    result = {
        **plan.as_dict(arguments.tokens),
        "bound": str(bound).removeprefix("rel:"),
        "ratio_from": "given" if arguments.ratio is not None else str(arguments.input or "the sample of kvzip"),
    }
    if arguments.plot:
        lengths = sorted({int(10 ** (step / 10)) for step in range(10, 61)})  # 10 to a million
        plots.save(plots.break_even, {**result, "rows": [plan.row(tokens) for tokens in lengths]}, arguments.plot)
    print(to_json(result) if arguments.json else plan_table(result))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from kvzip.info import system_info

    info = system_info()
    if arguments.json:
        print(to_json(info, indent=2))
    else:
        print(columns(list(flatten(info))))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from kvzip.adapters.lmcache.stored import SEAL_BYTES

    with arguments.file.open("rb") as file:  # no more of it than there can be: it may be any file, or a device
        data = file.read(MAX_HEADER_BYTES)
        header = read_header(data)
        data += file.read(max(0, header.record_bytes + SEAL_BYTES + 1 - len(data)))
    sealed = len(data) == header.record_bytes + SEAL_BYTES
    read_record(data[: header.record_bytes] if sealed else data)
    fields = header_fields(header)
    if sealed:
        fields["lmcache_seal"] = data[header.record_bytes :].hex()
    print(to_json(fields) if arguments.json else columns(list(flatten(fields))))
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from kvzip.adapters.transformers.models import load_model
    from kvzip.adapters.transformers.moments import calibrate

    texts = list(_texts(arguments.text).values())
    fit_texts = _texts(arguments.fit)
    _check_files(arguments.out)
    model = load_model(arguments.model, device=arguments.device)
    progress = _progress("texts")
    table = calibrate(model, texts, max_tokens=arguments.tokens, progress=progress)
    if arguments.gradients:
        from kvzip.adapters.transformers.gradients import weigh

        table = weigh(model, table, texts, max_tokens=arguments.tokens, progress=progress)
    measured: dict[str, float] = {}
    if fit_texts:
        from kvzip.adapters.transformers.fit import fit

        fitted = fit(model, table, fit_texts, max_tokens=arguments.tokens, progress=_progress("rounds"))
        table = fitted.table
        measured = {"kl": fitted.kl, "kl_limit": fitted.limit, "ratio": fitted.ratio}
    table.save(arguments.out)
    layers, heads, head_dim = table.geometry
    found = {
        "model": table.model,
        "layers": layers,
        "kv_heads": heads if table.is_uniform else [h for h, _ in table.shapes],
        "head_dim": head_dim if table.is_uniform else [d for _, d in table.shapes],
        "tokens": table.tokens,
        "t": table.t,
        "r": table.r,
        **measured,
        "table": str(arguments.out),
    }
    print(to_json(found) if arguments.json else columns([(name, str(value)) for name, value in found.items()]))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.model:
        return _verify_model(arguments)
    if arguments.text or arguments.bound or arguments.mode or arguments.plot:
        raise ConfigError("--text, --bound, --mode and --plot are for a model: give --model, or none of them")
    from kvzip import selfcheck

    result = selfcheck.run(arguments.device, _progress("cases"))
    if arguments.json:
        print(to_json(result))
    else:
        print(
            columns(
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
        print(to_json(found))
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
    parser = build_parser()
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


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "bench": _bench,
    "plan": _plan,
    "verify": _verify,
    "calibrate": _calibrate,
    "info": _info,
    "inspect": _inspect,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
