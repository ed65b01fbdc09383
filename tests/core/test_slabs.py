"""Slabs: results in order, work within work, and errors; threads that stay."""

import multiprocessing
import threading

import pytest
import torch

from poise.core import slabs
from poise.core.slabs import map_slabs


@pytest.fixture(autouse=True)
def several_slabs_and_threads(monkeypatch):
    monkeypatch.setattr(slabs, "WEIGHTS", 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def row_of(rows: slice) -> int:
    return rows.start


def test_slabs_cover_all_rows_in_order():
    assert map_slabs(lambda rows: rows, 7, 5) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    assert map_slabs(lambda rows: rows, 7, 5, tile_rows=3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert map_slabs(lambda rows: rows, 0, 5) == [slice(0, 0)]


def test_every_slab_has_one_thread_and_the_caller_gets_its_own_back():
    assert map_slabs(lambda _: torch.get_num_threads(), 8, 5) == [1] * 4
    assert torch.get_num_threads() == 2


def test_two_slabs_go_on_at_a_time():
    meeting = threading.Barrier(2, timeout=30)
    map_slabs(lambda _: meeting.wait(), 8, 5)


def test_work_may_itself_be_done_in_slabs():
    found = map_slabs(lambda rows: map_slabs(row_of, 6, 5), 8, 5)
    assert found == [[0, 2, 4]] * 4


def test_threads_stay():
    def thread(_: slice) -> int:
        meeting.wait()
        return threading.get_ident()

    meeting = threading.Barrier(2, timeout=30)
    assert set(map_slabs(thread, 4, 5)) == set(map_slabs(thread, 4, 5))


def test_an_error_is_told_when_no_slab_is_at_work_any_more():
    busy = []

    def work(rows: slice) -> None:
        if rows.start == 0:
            raise ValueError("of the first slab")
        busy.append(rows.start)
        threading.Event().wait(0.05)
        busy.remove(rows.start)

    with pytest.raises(ValueError, match="of the first slab"):
        map_slabs(work, 40, 5)
    assert busy == []
    assert torch.get_num_threads() == 2


def in_child(queue: "multiprocessing.Queue[list[int]]") -> None:
    queue.put(map_slabs(row_of, 8, 5))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    map_slabs(row_of, 8, 5)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=60) == [0, 2, 4, 6]
    child.join(60)
