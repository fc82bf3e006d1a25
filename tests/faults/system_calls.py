"""A library, loaded before the C library, that refuses or delays calls on some files.

So does a quota, a failing drive, a read-only mount or a slow disk. Page faults of mapped files are
not calls, and stay as they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
static int refused(int file, const char *call) {
    const char *part = getenv("REFUSED_PATH"), *calls = getenv("REFUSED_CALLS");
    char link[64], path[4096];
    const char *delay = getenv("DELAY_US");
    if (!part || !calls || (!delay && strcmp(calls, call))) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, part)) return 0;
    if (delay) {
        usleep(atoi(delay));
        return 0;
    }
    errno = atoi(getenv("REFUSED_ERRNO"));
    return 1;
}
#define REFUSING(type, name, call, parameters, arguments) \
    type name parameters { \
        static type (*real) parameters; \
        if (!real) real = (type (*) parameters) dlsym(RTLD_NEXT, #name); \
        return refused(file, call) ? -1 : real arguments; \
    }
REFUSING(ssize_t, write, "write", (int file, const void *b, size_t n), (file, b, n))
REFUSING(ssize_t, writev, "write", (int file, const struct iovec *b, int n), (file, b, n))
REFUSING(ssize_t, pwrite, "write", (int file, const void *b, size_t n, off_t o), (file, b, n, o))
REFUSING(ssize_t, pwrite64, "write", (int file, const void *b, size_t n, off64_t o), \
    (file, b, n, o))
REFUSING(ssize_t, read, "read", (int file, void *b, size_t n), (file, b, n))
REFUSING(ssize_t, pread, "read", (int file, void *b, size_t n, off_t o), (file, b, n, o))
REFUSING(ssize_t, pread64, "read", (int file, void *b, size_t n, off64_t o), (file, b, n, o))
REFUSING(int, fsync, "fsync", (int file), (file))
REFUSING(int, fdatasync, "fsync", (int file), (file))
"""


def build_library(place: Path) -> Path:
    """Return the library, compiled in a folder; skip the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    (place / "calls.c").write_text(_LIBRARY)
    command = [compiler, "-shared", "-fPIC", "-o", "calls.so", "calls.c", "-ldl"]
    subprocess.run(command, cwd=place, check=True)
    return place / "calls.so"


def refuse(part: str, calls: str, number: int) -> None:
    os.environ.update(REFUSED_PATH=part, REFUSED_CALLS=calls, REFUSED_ERRNO=str(number))


def refuse_nothing() -> None:
    os.environ.pop("REFUSED_CALLS", None)


def delaying(library: Path, part: str, delay_us: int) -> dict[str, str]:
    """Return the environment of a process whose calls on files with `part` in their path wait."""
    return {
        "LD_PRELOAD": str(library),
        "REFUSED_PATH": part,
        "REFUSED_CALLS": "all",
        "DELAY_US": str(delay_us),
    }
