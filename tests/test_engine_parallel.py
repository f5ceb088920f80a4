"""One model on several devices: here two processes of the CPU engine, a core each."""

import asyncio
from collections.abc import AsyncIterator, Callable

import psutil
import pytest
import pytest_asyncio

from tests.engines import TINY, Engine, build, eventually, generate, started, user

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:::vllm"),
]

# Other orders of adding up must not change a word.
OPTIONS = {"MAX_MODEL_LEN": "256", "DTYPE": "float32"}


def processes() -> dict[int, str]:
    """Return the engine's processes that live, with their titles."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        if process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in title:
            found[process.pid] = title
    return found


@pytest.fixture(scope="module")
def before() -> set[int]:
    return set(processes())


@pytest.fixture(scope="module")
def built_double(before: set[int]) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        # By itself vLLM keeps one core per process free, and here are two in all.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        return build(TINY, "tiny", TENSOR_PARALLEL_SIZE="2", **OPTIONS)


@pytest.fixture(scope="module")
def built_single(built_double: Engine) -> Engine:
    return build(TINY, "tiny", **OPTIONS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def single(built_single: Engine) -> AsyncIterator[Engine]:
    async with started(built_single) as engine:
        yield engine


async def test_two_halves_answer_as_the_whole_and_leave_nothing_behind(
    built_double: Engine, single: Engine, before: set[int]
) -> None:
    assert built_double.config.parallel_config.tensor_parallel_size == 2
    mine = processes()
    async with started(built_double) as double:
        assert sum("Worker_TP" in title for title in mine.values()) == 2, mine
        for body in (
            {"prompt": "Hello there"},
            {"prompt": [100, 200, 300]},
            {"messages": user("Tell me about the sea.")},
        ):
            answers = await asyncio.gather(
                *(
                    generate(engine, max_tokens=24, ignore_eos=True, logprobs=0, **body)
                    for engine in (double, single)
                )
            )
            assert answers[0].text == answers[1].text != ""
            of_double, of_single = (
                [entry["logprob"] for entry in answer.logprobs] for answer in answers
            )
            assert of_double == pytest.approx(of_single, abs=1e-3)
    ours = [pid for pid, title in mine.items() if "Worker_TP" in title]
    assert await eventually(lambda: not set(ours) & set(processes()))


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("TENSOR_PARALLEL_SIZE", lambda found: found.tensor_parallel_size),
        ("PIPELINE_PARALLEL_SIZE", lambda found: found.pipeline_parallel_size),
        ("DATA_PARALLEL_SIZE", lambda found: found.data_parallel_size),
    ],
)
async def test_the_settings_reach_vllms_own_configuration(
    setting: str, read: Callable[[object], int]
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from engine_options import serve_args

    args = serve_args(str(TINY), ["tiny"], {setting: "2"}, 0.5)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert read(config.parallel_config) == 2
