"""A working folder with the uninterrupted run in it, copied per test; the ledger of a session."""

import shutil

import pytest
import torch
from kit import FULL, Course, Ledger, can_mount, write_record, write_shop

LEDGER = Ledger()


@pytest.fixture
def ledger():
    """Counts of this session so far, written after each test: the next may not come to an end."""
    yield LEDGER
    if FULL:
        write_record(LEDGER.rows())


@pytest.fixture(scope="session")
def first_course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    write_shop(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums have one order, and forks no threads to miss
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        course = Course()
    torch.set_num_threads(threads)
    return folder, course


@pytest.fixture
def course(first_course, tmp_path, monkeypatch):
    """The course, its folder copied to be worked in."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shutil.copytree(first_course[0], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    yield first_course[1]
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def mounts():
    if not can_mount():
        pytest.skip("needs a system where a process may have mounts of its own (Linux: unshare)")
