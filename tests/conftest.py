"""Fixtures for all tests: the golden numbers, and a report that counts comparisons with them."""

import gc
import os

# torch's idle threads spin by default; beside another process on few cores that costs more than
# the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # No test may need the network.
if not os.environ.get(
    "LTU_TEST_GPU"
):  # The golden numbers are a CPU's; so is what every machine has.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
COMPARISONS = pytest.StashKey[dict[str, list[tuple[str, float, float]]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COMPARISONS] = {}


def pytest_collection_finish() -> None:
    """Keep the modules out of garbage collection, which would walk through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The committed golden numbers; tests/golden/README.md says where they come from."""
    return GOLDEN


@pytest.fixture(scope="session")
def full_golden() -> Path:
    """The full set, of which tests/golden is a part: $LTU_GOLDEN, or ../shared/golden."""
    folder = Path(os.environ.get("LTU_GOLDEN", GOLDEN.parents[2] / "shared" / "golden"))
    if not (folder / "rule_init.py").is_file():
        pytest.skip(f"the full golden numbers are not at {folder}; set LTU_GOLDEN")
    return folder


@pytest.fixture(scope="session")
def golden_report(pytestconfig: pytest.Config) -> Callable[[str, str, float, float], None]:
    """`golden_report(module, name, error, bound)` counts a comparison and asserts the bound."""

    def report(module: str, name: str, error: float, bound: float) -> None:
        error = float(error)
        pytestconfig.stash[COMPARISONS].setdefault(module, []).append((name, error, bound))
        assert error <= bound, f"{module}, {name}: off by {error:.3g}, the bound is {bound:.3g}"

    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist: hand the comparisons to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["comparisons"] = session.config.stash[COMPARISONS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended: take its comparisons."""
    for module, comparisons in getattr(node, "workeroutput", {}).get("comparisons", {}).items():
        node.config.stash[COMPARISONS].setdefault(module, []).extend(comparisons)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for module, comparisons in config.stash[COMPARISONS].items():
        within = sum(error <= bound for _, error, bound in comparisons)
        # A nan is the worst of all, but compares as neither larger nor smaller.
        name, error, bound = max(
            comparisons, key=lambda c: float("inf") if c[1] != c[1] else c[1] / (c[2] or 1e-30)
        )
        terminalreporter.write_line(
            f"golden numbers: {module}: {within} of {len(comparisons)} within the bound "
            f"(worst {error:.2g} of bound {bound:.2g}: {name})"
        )
