"""Whether this process can compute on a GPU. CuPy is imported here only when asked."""

from __future__ import annotations


def gpu_here() -> tuple[str, str]:
    """The name of the current CUDA device and "", or "" and the reason why there is none."""
    try:
        import cupy  # type: ignore[import-not-found]
    except ImportError as error:
        return "", f"cupy cannot be imported ({error})"
    if not cupy.cuda.is_available():
        return "", "cupy finds no CUDA device"
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    return name.decode(), ""
