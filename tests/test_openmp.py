import threading

import pytest
import torch

from mebp_compile import openmp


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_each_piece_of_work_is_in_a_thread_of_its_own():
    both = threading.Barrier(2, timeout=20)  # neither ends before the other has begun
    seen = []

    def work():
        both.wait()
        seen.append(threading.get_ident())

    openmp.together([work, work])
    assert len(set(seen)) == 2
    assert threading.get_ident() in seen


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("enabled", [False, True])
def test_work_finds_the_callers_grad_mode(enabled):
    seen = []
    with torch.set_grad_enabled(enabled):
        openmp.together([lambda: seen.append(torch.is_grad_enabled())] * 2)
    assert seen == [enabled, enabled]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("failing", [0, 1])
def test_what_one_raises_is_raised_when_both_are_over(failing):
    over = []
    both = threading.Barrier(2, timeout=20)

    def fails():
        both.wait()
        raise ValueError("this one")

    def ends():
        both.wait()
        over.append(True)

    with pytest.raises(ValueError, match="this one"):
        openmp.together([fails, ends] if failing == 0 else [ends, fails])
    assert over == [True]


@pytest.mark.usefixtures("two_threads")
def test_ops_have_the_bits_of_one_thread():
    x, weight = torch.randn(64, 300), torch.randn(300, 80)
    results = [torch.empty(64, 80), torch.empty(64, 80)]
    openmp.together([lambda out=out: torch.mm(x, weight, out=out) for out in results])
    with openmp.one_thread():
        alone = torch.mm(x, weight)
    assert torch.get_num_threads() == 2
    assert all(torch.equal(result, alone) for result in results)


def test_a_single_piece_of_work_stays_in_its_thread():
    seen = []
    openmp.together([lambda: seen.append(threading.get_ident())])
    assert seen == [threading.get_ident()]


def test_without_the_library_there_is_one_thread(monkeypatch):
    monkeypatch.setattr(openmp, "_library", lambda: None)
    assert openmp.threads() == 1
    with openmp.one_thread():
        pass
