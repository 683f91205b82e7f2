"""CUDA C++ in the emulation: RawModule compiles the text for the CPU and runs every thread of every block.

The text is what NVRTC gets, behind cuda_cpu.h (which says what is checked), and compiled once for each text
and set of options, in a folder that all test runs share ($MESHTAPE_EMULATOR_CACHE). Arguments are taken as
CuPy takes them, and beyond that compared with the kernel's parameters: CUDA reads whatever bytes it finds.

With $MESHTAPE_EMULATOR_RACES every load and store is checked for races within its launch; see races.cpp.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from emulator.array import ndarray
from emulator.order import READ, UNKNOWN, WRITE, span
from emulator.streams import work

HEADER = Path(__file__).with_name("cuda_cpu.h")
RACES = Path(__file__).with_name("races.cpp")
# Misaligned accesses and indices beyond local arrays trap; the rest is what nvcc assumes as well.
FLAGS = ("-O0", "-g0", "-w", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-fwrapv",
         "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error", "-ftemplate-depth=2000")
# A call before every load and store of the text, and its lines, to name those that race.
CHECKED = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-DEMU_RACES", "-g1", "-c")
STATIC_SHARED = 48 << 10        # dynamic shared memory of a launch, unless a kernel is allowed more
OPTED_SHARED = 227 << 10        # the most that it can be allowed (compute capability 9.0)

_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+'
                     r'(?:__launch_bounds__\s*\(([^()]*(?:\([^()]*\))?[^()]*)\)\s*)?(\w+)\s*\(')
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:(?:__align__|alignas)\s*\(\s*\d+\s*\)\s*)?"
                      r"([\w:\s]+?)\s*\b(\w+)\s*\[\s*\]\s*;")
_SHARED = re.compile(r"(?<!extern )(__shared__\s[^;]*?\b(\w+)\s*(?:\[[^;]*\])?\s*;)")
_IGNORED = re.compile(r"-D.*|-{1,2}(use_fast_math|fmad=\w+|ftz=\w+|prec-\w+=\w+|lineinfo|maxrregcount=\d+|"
                      r"extra-device-vectorization|restrict|generate-line-info)")
_LAUNCHING = threading.Lock()   # fibers, handlers of signals and static texts are one per process


class CompileError(RuntimeError):
    """The compiler does not take a source."""


class KernelError(RuntimeError):
    """A kernel did what CUDA forbids: it diverged at a barrier, or touched what is not its memory."""


class RawModule:
    """cupy.RawModule of text with `extern "C"` functions. Raises CompileError where a function is first asked
    for."""

    def __init__(self, *, code: str | None = None, path: str | None = None, options: tuple[str, ...] = (),
                 backend: str = "nvrtc", translate_cucomplex: bool = False,
                 enable_cooperative_groups: bool = False, name_expressions: Any = None,
                 jitify: bool = False) -> None:
        if (code is None) == (path is None):
            raise TypeError("Exactly one of `code` and `path` keyword arguments must be given.")
        if code is None or backend != "nvrtc" or translate_cucomplex or enable_cooperative_groups \
                or name_expressions is not None or jitify:
            raise NotImplementedError("the emulation takes code for NVRTC, without name expressions")
        if type(code) is not str or type(options) is not tuple:
            raise TypeError(f"code is a str and options a tuple, got {type(code)} and {type(options)}")
        self.code, self.options = code, options
        self._library: ctypes.CDLL | None = None

    def get_function(self, name: str) -> Function:
        if self._library is None:
            self._library = ctypes.CDLL(str(compiled(self.code, self.options, checked())))
        if not hasattr(self._library, f"emu_launch_{name}"):
            raise KernelError(f'CUDA_ERROR_NOT_FOUND: there is no extern "C" __global__ void {name}(')
        return Function(self, self._library, name)

    def compile(self, log_stream: Any = None) -> None:
        compiled(self.code, self.options, checked())


# --- compilation ------------------------------------------------------------------------------------

def translated(code: str, options: tuple[str, ...]) -> str:
    """The text with a launcher for every kernel, as g++ takes it. Lines keep their numbers.

    Macros are defined behind the header, which may use their names.
    """
    def declared(found: re.Match[str]) -> str:
        return f'{found[1]} EMU_CHECK(shared(&{found[2]}, sizeof {found[2]}, "{found[2]}"));'

    def dynamic(found: re.Match[str]) -> str:
        kind, name = found.groups()
        return f"static {kind}* const {name} = reinterpret_cast<{kind}*>(emu::shared_memory);"

    names = {name: bound for bound, name in _KERNEL.findall(code)}
    launchers = [f'''
extern "C" const char* emu_parameters_{name}() {{ return emu::parameters(&{name}); }}
extern "C" unsigned emu_bound_{name}() {{
  const unsigned bounds[] = {{{bound or "1024"}}};
  return bounds[0];
}}
static void emu_call_{name}(void** args) {{ emu::call(&{name}, args); }}
extern "C" const char* emu_launch_{name}(const unsigned* dims, size_t shared, void** args) {{
  return emu::launch(&emu_call_{name}, dims, shared, args);
}}''' for name, bound in names.items()]
    macros = [f"#define {name} {value or 1}" for name, _, value in
              (option[2:].partition("=") for option in options if option.startswith("-D"))]
    return "\n".join((*macros, "#line 1", _DYNAMIC.sub(dynamic, _SHARED.sub(declared, code)), *launchers, ""))


def cpu_options(options: tuple[str, ...]) -> list[str]:
    """What g++ gets of NVRTC's options."""
    kept = []
    for option in options:
        if option.startswith(("-std=", "--std=")):
            kept.append(option.replace("--std", "-std"))
        elif not _IGNORED.fullmatch(option):
            raise CompileError(f"nvrtc: error: unrecognized option {option}")
    return kept


def checked() -> bool:
    """Whether kernels are checked for races: whether $MESHTAPE_EMULATOR_RACES is 1."""
    return os.environ.get("MESHTAPE_EMULATOR_RACES") == "1"


def compiled(code: str, options: tuple[str, ...], races: bool = False) -> Path:
    """The shared library of a source, from the cache or made now. Safe with other processes at the same."""
    text, flags = translated(code, options), (*FLAGS, *cpu_options(options))
    if not races:
        return built(text, flags, HEADER)
    # Linked apart: with -fsanitize=thread g++ would add its own library, which knows threads of the host.
    return built("", FLAGS, objects=(built(text, (*flags, *CHECKED), HEADER),
                                     built(RACES.read_text(), (*FLAGS, "-O2", "-c"))))


def built(text: str, flags: tuple[str, ...], header: Path | None = None,
          objects: tuple[Path, ...] = ()) -> Path:
    """What g++ makes of a text behind a header, or of objects."""
    parts = (text, header.read_text() if header else "", *flags, *map(str, objects))
    folder = Path(os.environ.get("MESHTAPE_EMULATOR_CACHE")
                  or f"{tempfile.gettempdir()}/meshtape-emulator-{os.getuid()}")
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    result = folder / f"{key}{'.o' if '-c' in flags else '.so'}"
    if result.exists():
        return result
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    include = ("-include", str(precompiled(folder, flags))) if header else ()
    with tempfile.TemporaryDirectory(dir=folder) as room:
        source, made = Path(room, "kernel.cpp"), Path(room, "made")
        source.write_text(text)
        run = subprocess.run(["g++", *flags, *include, *map(str, objects or [source]), "-o", str(made)],
                             capture_output=True, text=True)
        if run.returncode:
            raise CompileError(f"{' '.join(flags)}\n{run.stderr}")
        made.replace(result)
    return result


def precompiled(folder: Path, flags: tuple[str, ...]) -> Path:
    """The header with what g++ made of it beside it, which saves a third of each compilation."""
    key = hashlib.sha256("\0".join((HEADER.read_text(), *flags)).encode()).hexdigest()[:32]
    place = folder / f"{key}.header"
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=folder) as room:
            made = Path(room, "made")
            made.mkdir()
            shutil.copy(HEADER, made / HEADER.name)
            subprocess.run(["g++", *(f for f in flags if f not in ("-shared", "-c")), "-x", "c++-header",
                            str(made / HEADER.name), "-o", f"{made / HEADER.name}.gch"], check=True)
            with suppress(OSError):         # another process was quicker
                made.rename(place)
    return place / HEADER.name


# --- launches ---------------------------------------------------------------------------------------

class Function:
    """A kernel, called as f(grid, block, args, shared_mem=0, stream=None)."""

    def __init__(self, module: RawModule, library: ctypes.CDLL, name: str) -> None:
        self.module, self.__name__ = module, name
        self._path = library._name
        self._launch = getattr(library, f"emu_launch_{name}")
        self._launch.restype = ctypes.c_char_p
        parameters = getattr(library, f"emu_parameters_{name}")
        parameters.restype = ctypes.c_char_p
        with _LAUNCHING:                # the text is in static memory
            text = parameters().decode()
        self.parameters = [(p[0], int(p[1:])) for p in text.split()]
        self.max_threads_per_block = getattr(library, f"emu_bound_{name}")()
        self._max_dynamic = STATIC_SHARED

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._max_dynamic

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        if size > OPTED_SHARED:
            raise KernelError(f"CUDA_ERROR_INVALID_VALUE: {size} bytes of shared memory, at most "
                              f"{OPTED_SHARED}")
        self._max_dynamic = size

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0, stream: Any = None) -> None:
        """Run the kernel; in a capture, record it. Raises TypeError where CuPy takes no such argument or it
        is not what the kernel's parameter is, and KernelError."""
        dims = self._dims(grid, block)
        if shared_mem > self._max_dynamic:
            raise KernelError(f"CUDA_ERROR_INVALID_VALUE: {self.__name__} asks for {shared_mem} bytes of "
                              f"shared memory and is allowed {self._max_dynamic}; set "
                              f"max_dynamic_shared_size_bytes")
        args = tuple(args)
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.__name__} has {len(self.parameters)} parameters, got {len(args)} "
                            f"arguments")
        values = [marshalled(x, *p, f"{self.__name__}, argument {i}")
                  for i, (x, p) in enumerate(zip(args, self.parameters, strict=True))]

        work(lambda: self._run(dims, shared_mem, values), stream, self._touches(args))

    def _touches(self, args: tuple[Any, ...]) -> list[tuple[int, int, str]]:
        """Arrays behind const pointers are read, others are written to."""
        found = re.search(rf"\b{self.__name__}\s*\(([^)]*)\)", self.module.code)
        texts = found[1].split(",") if found is not None else []
        known = len(texts) == len(args)
        return [span(x._a, (READ if "const" in texts[i].split("*")[0] else WRITE) if known else UNKNOWN)
                for i, x in enumerate(args) if isinstance(x, ndarray)]

    def _dims(self, grid: Any, block: Any) -> tuple[int, ...]:
        """Grid and block as CuPy takes them: tuples, where 0 is raised to 1."""
        if type(grid) is not tuple or type(block) is not tuple:
            raise TypeError(f"grid and block are tuples, got {grid!r} and {block!r}")
        sizes = [*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3]]
        if any(type(n) is not int for n in sizes):
            raise TypeError(f"grid and block hold integers, got {grid!r} and {block!r}")
        dims = tuple(max(1, n) for n in sizes)
        for n, limit in zip(dims, (2**31 - 1, 65535, 65535, 1024, 1024, 64), strict=True):
            if n > limit:
                raise KernelError(f"CUDA_ERROR_INVALID_VALUE: grid {grid}, block {block}")
        if dims[3] * dims[4] * dims[5] > self.max_threads_per_block:
            raise KernelError(f"CUDA_ERROR_INVALID_VALUE: {self.__name__} has at most "
                              f"{self.max_threads_per_block} threads per block, got {block}")
        return dims

    def _run(self, dims: tuple[int, ...], shared_mem: int, values: list[Any]) -> None:
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(v.ctypes.data for v in values))
        with _LAUNCHING:
            error = self._launch((ctypes.c_uint * 6)(*dims), ctypes.c_size_t(shared_mem), pointers)
        if error:
            raise KernelError(f"{self.__name__}: {self._with_lines(self._located(error.decode()))}")

    def _located(self, text: str) -> str:
        """With lines of the source in place of {offset in the library}, and of the calls that led there."""
        def lines(found: re.Match[str]) -> str:
            run = subprocess.run(["addr2line", "-i", "-e", self._path, found[1]], capture_output=True,
                                 text=True, check=True)
            return " in ".join(f"line {n}" for n in re.findall(r"kernel\.cpp:(\d+)", run.stdout))
        return re.sub(r"\{([0-9a-f]+)\}", lines, text)

    def _with_lines(self, text: str) -> str:
        lines = self.module.code.splitlines()
        found = sorted({int(n) for n in re.findall(r"\bline (\d+)", text)})
        return "\n".join((text, *(f"{n:6d}  {lines[n - 1].strip()}" for n in found if 0 < n <= len(lines))))


def marshalled(x: Any, kind: str, size: int, where: str) -> np.ndarray[Any, Any]:
    """An argument's bytes, as an array of one element. `kind` and `size` are those of the parameter."""
    pointer = getattr(getattr(x, "data", None), "ptr", None)
    if pointer is None:
        pointer = 0 if x is None else getattr(x, "ptr", None)
    if pointer is not None:
        given, value = "p", np.array(pointer, np.uint64)
    elif isinstance(x, np.ndarray):
        if x.size != 1:
            raise TypeError(f"{where}: a numpy.ndarray of shape {x.shape}; only those of size one can be "
                            f"passed (by value)")
        given, value = "s" if x.dtype.kind == "V" else kind_of(x.dtype), x.copy()
    elif isinstance(x, (bool, int, float, np.generic)):
        value = np.array(x, np.int64) if type(x) is int else np.array(x)
        given = kind_of(value.dtype)
    else:
        raise TypeError(f"{where}: Unsupported type {type(x)}")
    same = given == kind or {given, kind} <= {"i", "u"} or (kind == "s" and given != "p")
    if not same or value.itemsize != size:
        raise TypeError(f"{where}: the parameter is {KINDS[kind]} of {size} bytes, got {KINDS[given]} of "
                        f"{value.itemsize} ({type(x).__name__})")
    return value


KINDS = {"p": "a pointer", "f": "a float", "i": "an integer", "u": "an unsigned integer", "b": "a bool",
         "s": "a struct"}


def kind_of(dtype: np.dtype[Any]) -> str:
    return {"f": "f", "i": "i", "u": "u", "b": "b"}.get(dtype.kind, "s")
