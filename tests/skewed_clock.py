"""A library, loaded before the C library, whose clock is wrong, as another machine's may be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *)) dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    const char *shift = getenv("CLOCK_SHIFT_S");
    if (!result && shift && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += atol(shift);
    return result;
}
time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *result, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    result->tv_sec = now.tv_sec;
    result->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


def skewed_by(place: Path, shift_s: int) -> dict[str, str]:
    """Return the environment of a process whose clock is ahead; the library goes into `place`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    (place / "clock.c").write_text(_LIBRARY)
    command = [compiler, "-shared", "-fPIC", "-o", "clock.so", "clock.c", "-ldl"]
    subprocess.run(command, cwd=place, check=True)
    return {"LD_PRELOAD": str(place / "clock.so"), "CLOCK_SHIFT_S": str(shift_s)}
