# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_bolt explain``, ``tune`` and ``advise``, of a function in a module.

The function is named as MODULE:FUNCTION, its arguments by a function without
parameters that returns them. What goes wrong in the user's own code is told with its
place, without a traceback through ours.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import math
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from . import api, arguments
from .codesign import activation
from .codesign.advice import Advice
from .command import UsageError, UserCodeError, add_parser, architecture
from .report import Report
from .site import NOTHING, UNSEEN

_ARGUMENTS = "example_args"
_NAMING = """\
MODULE is a module that Python can import from here, such as my.model, or a file, such
as my/model.py. FUNCTION is a function, optimized or not, or a path to one, such as
net.apply. Its arguments are what example_args(), of the same module, returns as a
tuple; --args names another function. They may be arrays, or jax.ShapeDtypeStruct:

  def example_args():
      images = jax.ShapeDtypeStruct((32, 224, 224, 3), jnp.bfloat16)
      return jax.eval_shape(net.init, jax.random.key(0), images), images
"""
_EXPLAIN = f"""\
examples:
  python -m jax_bolt explain model.py:predict                   for the GPU here, if any
  python -m jax_bolt explain model.py:predict --arch sm_90a     without a GPU
  python -m jax_bolt explain my.model:predict --args my.data:batch --html report.html

{_NAMING}"""
_TUNE = f"""\
examples:
  python -m jax_bolt tune model.py:predict
  python -m jax_bolt tune model.py:predict --budget 600 --html report.html

Needs the GPU. `python -m jax_bolt cache export` takes the results elsewhere.

{_NAMING}"""
_ADVISE = f"""\
examples:
  python -m jax_bolt advise model.py:predict                    measured on the GPU here
  python -m jax_bolt advise model.py:predict --budget-s 120     the longest sites first
  python -m jax_bolt advise model.py:predict --arch sm_90a      estimated, without a GPU
  python -m jax_bolt advise model.py:predict --activations relu,elu --json

Says what the model's convs and products would take with other activations; which of
their channels fill no unit of the hardware, and what more channels would take; and what
a 1x1 conv after each spatial one would add. Estimates are those of the model that puts
candidates in order, and are marked with "~". Nothing is changed.

{_NAMING}"""


def add_to(commands: Any) -> None:
    """Adds the three commands to the parsers of a command line."""
    text = "says what runs each conv and product of a function, and why"
    explain = add_parser(commands, "explain", text, _EXPLAIN, _explain)
    _add_naming(explain)
    _add_arch(explain, "that of the GPU here")
    _add_output(explain)
    text = "tunes and compiles all that a function needs, ahead of time"
    tune = add_parser(commands, "tune", text, _TUNE, _tune)
    _add_naming(tune)
    _add_budget(tune)
    _add_output(tune)
    # What the other two take: it is told why there is none here.
    tune.add_argument("--arch", help=argparse.SUPPRESS)
    text = "says what other activations, channels and 1x1 convs would take"
    advise = add_parser(commands, "advise", text, _ADVISE, _advise)
    _add_naming(advise)
    _add_arch(advise, "the GPU here is measured, or sm_90a estimated")
    _add_budget(advise)
    advise.add_argument(
        "--activations",
        type=activation.names,
        metavar="NAME[,NAME]",
        help="functions of jax.nn to try (default: the common ones)",
    )
    _add_json(advise)


def _add_naming(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("function", metavar="MODULE:FUNCTION")
    parser.add_argument(
        "--args",
        dest="arguments",
        metavar="[MODULE:]FUNCTION",
        help=f"what returns its arguments (default: {_ARGUMENTS})",
    )


def _add_arch(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--arch", metavar="NAME", help=f"such as sm_90a (default: {default})"
    )


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("--budget", "--budget-s"),
        type=_seconds,
        metavar="SECONDS",
        help="what it may take (default: the option budget_s)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")


def _add_output(parser: argparse.ArgumentParser) -> None:
    _add_json(parser)
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write the report as a page"
    )


def _explain(args: argparse.Namespace) -> None:
    architecture(args.arch)  # before the user's module, which may take long
    _check_html(args)
    fun, given = _named(args)
    with contextlib.redirect_stdout(sys.stderr):
        report = api.explain(fun, *given, arch=args.arch)
    _show(report, args)
    if not report.arch:
        print(
            "JAX sees no GPU here; add --arch sm_90a to plan for one", file=sys.stderr
        )


def _tune(args: argparse.Namespace) -> None:
    if args.arch is not None:
        raise UsageError(
            "tune takes no --arch: it measures, on the GPU itself; run it there, or "
            f"`explain {args.function} --arch {args.arch}` here"
        )
    _check_html(args)
    fun, given = _named(args)
    with contextlib.redirect_stdout(sys.stderr):
        report = api.tune(fun, *given, budget_s=args.budget)
    _show(report, args)


def _advise(args: argparse.Namespace) -> None:
    architecture(args.arch)
    try:
        for name in args.activations or ():
            activation.named(name, "f32")
    except ValueError as error:
        raise UsageError(str(error)) from error
    fun, given = _named(args)
    with contextlib.redirect_stdout(sys.stderr):
        advice = api.advise(
            fun,
            *given,
            arch=args.arch,
            activations=args.activations,
            budget_s=args.budget,
        )
    _print(advice, args)
    if args.json and not (advice.sites or advice.refused):
        print(f"{NOTHING}: {UNSEEN}", file=sys.stderr)


def _check_html(args: argparse.Namespace) -> None:
    """Now, and not when all is done."""
    if args.html is not None and not args.html.absolute().parent.is_dir():
        raise UsageError(f"there is no directory {args.html.absolute().parent}")


def _show(report: Report, args: argparse.Namespace) -> None:
    if args.html is not None:
        report.to_html(args.html)
    _print(report, args)
    if args.html is not None:
        print(f"{args.html} is written", file=sys.stderr)


def _print(report: Report | Advice, args: argparse.Namespace) -> None:
    if args.json:
        print(report.to_json())
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(report)
    else:
        print(report)


# --- What the user names


def _named(args: argparse.Namespace) -> tuple[Callable, tuple[Any, ...]]:
    """The function and its arguments; UsageError where there are none such."""
    # What their code prints is no part of what is asked for.
    with contextlib.redirect_stdout(sys.stderr):
        place, name = _parts(args.function)
        module = _module(place)
        fun = _attribute(module, place, name)
        if arguments.is_module(fun):
            apply = f"{args.function}.apply"
            raise UsageError(f"{args.function} is a module: did you mean {apply}?")
        if not callable(fun):
            raise UsageError(f"{args.function} is {_short(fun)}, which is no function")
        given = _arguments(module, place, args)
        # First as JAX alone sees it: what fails here is the function, or not for it.
        with _blaming(f"tracing {args.function}"):
            api.check_traceable(fun, given)
    return fun, given


def _arguments(
    module: ModuleType, place: str, args: argparse.Namespace
) -> tuple[Any, ...]:
    name = args.arguments or _ARGUMENTS
    if ":" in name:
        place, name = _parts(name)
        module = _module(place)
    elif args.arguments is None and not hasattr(module, _ARGUMENTS):
        raise UsageError(
            f"{place} has no function {_ARGUMENTS}: add one that returns the arguments "
            "as a tuple, or name another with --args"
        )
    maker = _attribute(module, place, name)
    label = f"{place}:{name}"
    if not callable(maker):
        raise UsageError(f"{label} is {_short(maker)}, which is no function")
    with _blaming(f"calling {label}"):
        given = maker()
    if not isinstance(given, tuple):
        raise UsageError(
            f"{label} returned {_short(given)}; it is to return the arguments as a "
            "tuple, a single one as (x,)"
        )
    return given


def _parts(text: str) -> tuple[str, str]:
    module, colon, function = text.rpartition(":")
    if not (module and colon and function):
        example = f"{text if text.endswith('.py') else 'model.py'}:predict"
        raise UsageError(
            f"{text!r} is not of the form MODULE:FUNCTION, such as {example}"
        )
    return module, function


@functools.cache
def _module(place: str) -> ModuleType:
    if place.endswith(".py") or "/" in place:
        return _file(Path(place))
    with _blaming(f"importing {place}"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            # Only where it is this one that is missing, and not one that it imports.
            if error.name and f"{place}.".startswith(f"{error.name}."):
                raise UsageError(
                    f"there is no module {error.name!r} here: name one that Python "
                    "finds from this directory, or a file such as model.py"
                ) from error
            raise
        except (ValueError, TypeError) as error:
            if place.startswith(".") or ".." in place or place.endswith("."):
                raise UsageError(f"{place!r} is no name of a module") from error
            raise


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    name = path.stem
    if name in sys.modules:  # one of ours or of the standard library's
        name = f"jax_bolt_user_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # As `python path` would have it: neighbours can be imported, and it can be found.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module
    with _blaming(f"importing {path}"):
        spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, place: str, name: str) -> Any:
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        raise UsageError(f"{place} has no {name!r}: {error}") from error


@contextlib.contextmanager
def _blaming(doing: str) -> Iterator[None]:
    """An error of the user's code as a line that says where it was raised."""
    try:
        yield
    except (UsageError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{doing} failed: {_told(error)}") from error


def _told(error: BaseException) -> str:
    # A syntax error's own text names the file already, without its directory.
    words = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(words.split()) or "without a word"
    text = text if len(text) < 500 else f"{text[:500]}..."
    notes = [n for n in getattr(error, "__notes__", ()) if n.startswith("jax_bolt")]
    text = "; ".join([text, *notes])
    where = ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}:{error.lineno})"
    elif frames := _users_frames(error):
        where = f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})"
    return f"{type(error).__name__}: {text}{where}"


def _users_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Where the error passed, without what is installed, and us."""
    others = (str(Path(__file__).parents[1]), f"{sys.base_prefix}/lib", "<frozen")
    return [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
        and not frame.filename.startswith(others)
    ]


def _short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        sizes = ", ".join(map(str, value.shape))
        return f"an array, {value.dtype}[{sizes}]"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:60] + '...'}"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds
