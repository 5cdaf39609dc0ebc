"""EvalPlus's make_model, run_codegen and evaluate, plus the backend "peft_moe".

Every other backend goes to EvalPlus with the caller's arguments. Nothing of EvalPlus is changed, at import or later.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylo_moe.errors import OptionError
from dylo_moe.tasks import TaskSet, load_tasks

if TYPE_CHECKING:
    from evalplus.provider.base import DecoderBase

    from dylo_moe.generating import Generation
    from dylo_moe.scoring import Limits

BACKEND = "peft_moe"
STOCK_BACKENDS = ("vllm", "hf", "openai", "anthropic", "google")  # of EvalPlus 0.3.1, which makes None of any other name
_NOT_DECODER = ("routing_strategy", "shard", "ray")  # options of ours that PeftMoEDecoder does not take as they are
# EvalPlus 0.3.1, codegen.py: its sentences around a task in a chat prompt.
INSTRUCTION_PREFIX = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
RESPONSE_PREFIX = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)


def make_model(  # noqa: PLR0913  (EvalPlus's signature, and ours after it)
    model: str,
    backend: str,
    dataset: str,
    batch_size: int = 1,
    temperature: float = 0.0,
    force_base_prompt: bool = False,
    instruction_prefix: str | None = None,
    response_prefix: str | None = None,
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
    tp: int = 1,
    base_url: str | None = None,
    attn_implementation: str = "eager",
    *,
    base_model: str | None = None,
    adapter_path: str | None = None,
    routing_strategy: str = "router",
    wandb_artifact: str | None = None,
    max_new_tokens: int = 768,
    seed: int = 0,
    device_map: Any = None,
    assume: Mapping[str, Any] | None = None,
    autocast_adapter_dtype: bool = True,
) -> DecoderBase:
    """EvalPlus's `make_model`; with backend="peft_moe" a PeftMoEDecoder, which see for the options after the star.

    Raises:
        OptionError: an option of peft_moe with another backend. For peft_moe, what PeftMoEDecoder raises.
    """
    shared = {
        "dataset": dataset,
        "batch_size": batch_size,
        "temperature": temperature,
        "force_base_prompt": force_base_prompt,
        "instruction_prefix": instruction_prefix,
        "response_prefix": response_prefix,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
    }
    ours = {
        "base_model": base_model,
        "adapter_path": adapter_path,
        "routing_strategy": routing_strategy,
        "wandb_artifact": wandb_artifact,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "device_map": device_map,
        "assume": assume,
        "autocast_adapter_dtype": autocast_adapter_dtype,
    }
    if backend != BACKEND:
        from evalplus.provider import make_model as stock

        _refuse_ours(make_model, ours, backend)
        with _installed(backend):
            return stock(model=model, backend=backend, tp=tp, base_url=base_url, **shared)
    from dylo_moe.decoder import PeftMoEDecoder

    return PeftMoEDecoder(model, **shared, **ours)


def run_codegen(  # noqa: PLR0913  (EvalPlus's signature, and ours after it)
    model: str,
    dataset: str,
    root: str = "evalplus_results",
    bs: int | None = None,
    n_samples: int = 1,
    temperature: float = 0.0,
    resume: bool = True,
    greedy: bool = False,
    id_range: list[int] | None = None,
    version: str = "default",
    backend: str = "vllm",
    force_base_prompt: bool = False,
    base_url: str | None = None,
    tp: int = 1,
    evalperf_type: str | None = None,
    jsonl_fmt: bool = True,
    attn_implementation: str = "eager",
    trust_remote_code: bool = False,
    dtype: str = "bfloat16",
    *,
    base_model: str | None = None,
    adapter_path: str | None = None,
    routing_strategy: str = "router",
    wandb_artifact: str | None = None,
    max_new_tokens: int = 768,
    seed: int = 0,
    device_map: Any = None,
    assume: Mapping[str, Any] | None = None,
    autocast_adapter_dtype: bool = True,
    shard: str | None = None,
    ray: str | None = None,
) -> str:
    """EvalPlus's `run_codegen`; with backend="peft_moe" samples go through a journal (see samples.py).

    A run continues the samples of an earlier one with the same weights, base, strategy, tasks, options and versions, and of
    no other; n_samples, id_range and bs may differ. greedy means temperature 0 and one sample, except that "round_robin"
    keeps its n_samples, one expert each. shard "2/4" makes the second quarter of the tasks, in files of its own, which
    `shards.merge_shards` (`dylo-moe merge`) makes a whole run of. ray is the address of a Ray cluster whose machines generate:
    "host:port", "ray://host:port", "auto" or "local".

    Returns:
        The path of the sample file.

    Raises:
        OptionError, ArtifactError, CheckpointError, TaskSetError, PromptError, SampleFileError, ClusterError: one line each.
    """
    given = dict(locals())
    if backend != BACKEND:
        from evalplus.codegen import run_codegen as stock

        _check_backend(backend)
        ours = {name: given.pop(name) for name in _own_options(run_codegen)}
        _refuse_ours(run_codegen, ours, backend)
        with _installed(backend):
            return stock(**given)
    from dylo_moe.spreading import generate_samples

    generation = plan_generation(given, (routing_strategy,))
    return str(generate_samples(generation, Path(root) / dataset)[routing_strategy])


def plan_generation(options: Mapping[str, Any], strategies: Sequence[str], task_set: TaskSet | None = None) -> Generation:
    """What `generate_samples` takes, for the backend peft_moe.

    Args:
        options: arguments of `run_codegen` by name; what is missing has its default there. routing_strategy is not looked at.
        strategies: all of them run on one loaded model.
        task_set: instead of what `dataset` and `version` name, for instance a part of it.

    Raises:
        OptionError: a combination that cannot be. ArtifactError, TaskSetError: one line each.
    """
    given = inspect.signature(run_codegen).bind(**options)
    given.apply_defaults()
    given = given.arguments
    if given["evalperf_type"] is not None or not given["jsonl_fmt"]:
        raise OptionError(f"{BACKEND} has no evalperf_type, and writes JSON lines only")
    temperature = checked_temperature(given["temperature"], given["n_samples"], greedy=given["greedy"])
    from dylo_moe.decoder import adapter_or_artifact
    from dylo_moe.generating import Generation
    from dylo_moe.journal import parse_shard

    ours = {name: given[name] for name in _own_options(run_codegen) if name not in _NOT_DECODER}
    shared = ("dataset", "force_base_prompt", "attn_implementation", "trust_remote_code", "dtype")
    return Generation(
        task_set=task_set or load_tasks(given["dataset"], version=given["version"]),
        task_range=checked_range(given["id_range"]),
        n_samples=given["n_samples"],
        greedy=given["greedy"],
        resume=given["resume"],
        decoder={
            **ours,
            **{name: given[name] for name in shared},
            "adapter_path": adapter_or_artifact(given["adapter_path"], given["wandb_artifact"]),  # once, here
            "wandb_artifact": None,
            "name": str(given["model"]),
            "batch_size": given["bs"],
            "temperature": temperature,
            "instruction_prefix": INSTRUCTION_PREFIX,
            "response_prefix": RESPONSE_PREFIX,
        },
        strategies=tuple(strategies),
        shard=None if given["shard"] is None else parse_shard(given["shard"]),
        ray=given["ray"],
    )


def checked_temperature(temperature: float, n_samples: int, *, greedy: bool) -> float:
    """The temperature to generate with; 0 for greedy.

    Raises:
        OptionError: temperature 0 without greedy, or no samples.
    """
    if not greedy and temperature == 0:
        raise OptionError("temperature 0 is greedy decoding: add greedy, or set a temperature above 0")
    if n_samples < 1:
        raise OptionError(f"n_samples {n_samples}, but should be at least 1")
    return 0.0 if greedy else float(temperature)


def evaluate(  # noqa: PLR0913  (EvalPlus's signature)
    dataset: str,
    samples: str | None = None,
    base_only: bool = False,
    parallel: int | None = None,
    i_just_wanna_run: bool = False,
    test_details: bool = False,
    min_time_limit: float | None = None,
    gt_time_limit_factor: float = 4.0,
    mini: bool = False,
    noextreme: bool = False,
    version: str = "default",
    *,
    sandbox: str = "auto",
    **model_options: Any,
) -> dict[str, Any] | None:
    """EvalPlus's `evaluate`, which returns its result. With any other backend than "peft_moe" it is EvalPlus's own (None).

    Args:
        samples: a sample file or directory; None generates samples first, with `model_options` as in `run_codegen`.
        parallel: processes that run code; None for half the processors.
        i_just_wanna_run: score again although results for exactly these samples, tasks and limits are stored.
        min_time_limit: seconds per input at least; None for 4 (EvalPlus's own: 1).
        sandbox: what generated code runs in: "auto", "bwrap" or "none"; see `scoring.Scorer`.
        model_options: of `run_codegen`. id_range also goes with `samples`, and then only tasks in the range are scored.

    Returns:
        See `results.summarise`. It is also written beside the samples, as *_eval_results.json.

    Raises:
        As `run_codegen`; ScoringError where a canonical solution cannot be run.
    """
    given = dict(locals())
    generates = bool(model_options.keys() - {"id_range"})
    if generates and "model" not in model_options:
        raise OptionError("evaluate needs either samples, or a model and the options of its generation")
    if generates and model_options.get("backend") != BACKEND:
        if given.pop("sandbox") != "auto":
            raise OptionError(f"sandbox: an option of the backend {BACKEND}, but the backend is {model_options.get('backend')}")
        return _stock_evaluate(**{**given.pop("model_options"), **given})
    id_range = checked_range(model_options.get("id_range"))
    if generates == (samples is not None):
        raise OptionError("evaluate needs either samples, or a model and the options of its generation")
    from dylo_moe.evaluation import score_files, warn_unheld

    limits = make_limits(base_only, test_details, min_time_limit, gt_time_limit_factor)
    check_sandbox(sandbox)
    if generates:
        warn_unheld(sandbox)
        samples = _generate(dataset, version, model_options)
    task_set = load_tasks(dataset, version=version, mini=mini, noextreme=noextreme)
    scoring = {"parallel": parallel, "sandbox": sandbox, "again": i_just_wanna_run}
    result = score_files({samples: Path(samples)}, task_set, task_set.ids(id_range), limits, **scoring)[samples]
    _print(dataset, result)
    return result


def make_limits(
    base_only: bool = False,
    test_details: bool = False,
    min_time_limit: float | None = None,
    gt_time_limit_factor: float = 4.0,
) -> Limits:
    """EvalPlus's options of `evaluate` as `scoring.Limits`. min_time_limit: None for 4 seconds.

    Raises:
        OptionError: a limit that is not above 0.
    """
    from dylo_moe.scoring import MIN_TIME_LIMIT, Limits

    limit = MIN_TIME_LIMIT if min_time_limit is None else min_time_limit
    for what, value in {"min_time_limit": limit, "gt_time_limit_factor": gt_time_limit_factor}.items():
        if not 0 < value < math.inf:
            raise OptionError(f"{what} {value}, but should be above 0")
    return Limits(base_only, test_details, limit, gt_time_limit_factor)


def check_sandbox(sandbox: str) -> None:
    """Before anything is generated; raises OptionError."""
    from dylo_moe.scoring import SANDBOXES

    if sandbox not in SANDBOXES:
        raise OptionError(f"sandbox {sandbox!r}, but should be one of {', '.join(SANDBOXES)}")


def _generate(dataset: str, version: str, model_options: dict[str, Any]) -> str:
    options = {"dataset": dataset, "version": version, **model_options, "backend": BACKEND}
    try:
        inspect.signature(run_codegen).bind(**options)
    except TypeError as error:
        raise OptionError(f"{error}; the options are those of run_codegen") from None
    if options.get("shard") is not None:
        raise OptionError("shard: a part of the tasks has no score; generate all shards, merge them, and score that")
    return run_codegen(**options)


def _stock_evaluate(min_time_limit: float | None, **options: Any) -> None:
    from evalplus.evaluate import evaluate as stock

    backend = options.get("backend", "vllm")  # EvalPlus's own where none is given
    _check_backend(backend)
    ours = {name: options[name] for name in _own_options(run_codegen) if name in options}
    if ours:
        raise OptionError(f"{', '.join(ours)}: options of the backend {BACKEND}, but the backend is {backend}")
    with _installed(backend):
        return stock(**options, **({} if min_time_limit is None else {"min_time_limit": min_time_limit}))


def _own_options(function: Any) -> dict[str, Any]:
    """The options that EvalPlus does not have, which are those after the star, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


@contextmanager
def _installed(backend: str) -> Iterator[None]:
    """Around a call of EvalPlus's, for a backend that needs a package which is not here. Raises OptionError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise OptionError(f"backend {backend}: {error}; install it, or use {BACKEND}") from error


def _check_backend(backend: Any) -> None:
    """Raises OptionError where neither EvalPlus nor we have it."""
    if backend not in (BACKEND, *STOCK_BACKENDS):
        raise OptionError(f"backend {backend!r}, but should be one of {', '.join((BACKEND, *STOCK_BACKENDS))}")


def _refuse_ours(function: Any, given: dict[str, Any], backend: str) -> None:
    wrong = [name for name, default in _own_options(function).items() if given[name] != default]
    if wrong:
        raise OptionError(f"{', '.join(wrong)}: options of the backend {BACKEND}, but the backend is {backend}")


def checked_range(id_range: Any) -> tuple[int, int] | None:
    """EvalPlus's id_range as (low, high); raises OptionError."""
    if id_range is None:
        return None
    values = list(id_range) if isinstance(id_range, list | tuple) else []
    if len(values) != 2 or not all(isinstance(v, int) for v in values) or values[0] >= values[1]:
        raise OptionError(f"id_range {id_range!r}, but should be two numbers, the first lower: tasks low to high - 1")
    return values[0], values[1]


def _print(dataset: str, result: dict[str, Any]) -> None:
    for part, title in (("base", "base tests"), ("plus", "base + extra tests")):
        for name, value in (result[part] or {}).items():
            stock = result["stock"][part][name]
            note = f"   (EvalPlus 0.3.1: {stock:.3f})" if stock != value else ""
            print(f"{dataset} ({title}) {name}: {value:.3f}{note}")
    for found in result["differences"]:
        where = f"{found['task_id']} sample {found['sample']} ({found['tests']})"
        print(f"differs from EvalPlus 0.3.1: {where}: {found['ours']}, there {found['stock']}: {found['reason']}")
