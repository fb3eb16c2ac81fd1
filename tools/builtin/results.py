"""What a command did, as text for a model: its output, and a last line for whatever it has to know besides."""

from __future__ import annotations

from ridethrough.runtime.errors import SandboxTimeout
from ridethrough.sandboxes.profile import SandboxProfile
from ridethrough.sandboxes.sandbox import ExecResult


def told(result: ExecResult, profile: SandboxProfile) -> str:
    """The output of a command that has ended by itself or at a limit."""
    text = output_of(result)
    note = _ended_by(result, profile)
    return _with(text, note) if note else text or "(no output)"


def told_late(error: SandboxTimeout, timeout: float) -> str:
    """The output of a command that was ended because its time was up."""
    text = output_of(error.result) if isinstance(error.result, ExecResult) else ""
    return _with(text, f"[ended after {timeout:g} s, its deadline; give a longer timeout, or do less at once]")


def output_of(result: ExecResult) -> str:
    """Both streams; where the middle was not kept, a note stands for it."""
    parts = (
        _stream(result.stdout_bytes, result.stdout_total, result.truncated),
        _stream(result.stderr_bytes, result.stderr_total, result.truncated),
    )
    return "\n".join(part.rstrip("\n") for part in parts if part)


def _stream(kept: bytes, total: int, truncated: bool) -> str:
    if not truncated or total <= len(kept):
        return kept.decode("utf-8", "replace")
    cut = len(kept) - len(kept) // 2
    head, tail = kept[:cut].decode("utf-8", "replace"), kept[cut:].decode("utf-8", "replace")
    return f"{head}\n[... {total - len(kept)} bytes of output were not kept ...]\n{tail}"


def _with(text: str, note: str) -> str:
    return f"{text}\n{note}" if text else note


def _ended_by(result: ExecResult, profile: SandboxProfile) -> str:
    if result.limit == "memory":
        return f"[ended: it needed more than the sandbox's memory of {_size(profile.memory)}]"
    if result.limit == "pids":
        return f"[ended: it started more than the {profile.pids} processes and threads that the sandbox may have]"
    if result.limit == "disk":
        full = f"the disk of {_size(profile.disk)} was full; remove files, or write less"
        return f"[exit status {result.exit_code}: {full}]"
    if result.limit == "output":
        return "[ended: it wrote more output than is allowed; write it to a file and look at parts of it]"
    return f"[exit status {result.exit_code}]" if result.exit_code else ""


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
