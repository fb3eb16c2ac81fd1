"""The system calls of a sandbox: those that programs need, by name; everything else is refused.

A filter of our own, because Docker's default depends on the engine's version. Debian 12's still lets a sandbox without
a network open ``AF_VSOCK`` sockets, which no network namespace confines and which lead to the hypervisor of a virtual
machine, and ``io_uring``, from which containers have been left more than once. Beyond what newer defaults refuse, this
one refuses ``ptrace`` (debuggers do not work in a sandbox), sockets of all families but local ones, IP and netlink, and
programs of 32 bits, whose calls a filter cannot look into.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

_NAMES: Final = """
accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chmod chown clock_getres
clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64 close close_range connect
copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd
eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat
fchmodat2 fchown fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64
fstatat fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait
futex_waitv futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid
getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid
getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr getxattrat inotify_add_watch
inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64
io_setup io_submit ioctl ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self
lchown lgetxattr link linkat listen listxattr listxattrat llistxattr llseek lremovexattr lseek lsetxattr lstat lstat64
madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2
mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap nanosleep
newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll
ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease pselect6 pselect6_time64 pwrite64 pwritev
pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages
removexattr removexattrat rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending
rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 sendfile sendfile64 sendmmsg sendmsg
sendto set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid
setpriority setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid setxattr setxattrat shmat shmctl
shmdt shmget shutdown sigaltstack signalfd signalfd4 socketpair splice stat stat64 statfs statfs64 statx symlink
symlinkat sync sync_file_range sync_file_range2 syncfs sysinfo tee tgkill time timer_create timer_delete
timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime
timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64 umask uname unlink unlinkat utime
utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid write writev
"""

ALLOWED: Final = tuple(_NAMES.split())
"""What an ordinary program needs on Linux, on x86-64 and on ARM64; names that the engine does not know are passed over.

Not among them is what needs a capability that a sandbox has not, what reaches other processes or the kernel's own
state, and what makes namespaces. What is newer than all of these is answered with ENOSYS by runc.
"""

FAMILIES: Final[Mapping[str, int]] = {"local": 1, "IPv4": 2, "IPv6": 10, "netlink": 16}
"""Kinds of sockets that can be opened."""

NAMESPACES: Final = 0x7E020000
"""All flags of ``clone`` that make a namespace."""

PERSONALITIES: Final = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""Linux, with and without its old habits, and asking."""

ENOSYS: Final = 38


@cache
def filter_json() -> str:
    """The filter, as the engine's ``seccomp=`` option takes it."""
    rules = [
        _rule(ALLOWED),
        *(_rule(["socket"], 0, number) for number in FAMILIES.values()),
        *(_rule(["personality"], 0, number) for number in PERSONALITIES),
        {**_rule(["clone"]), "args": [{"index": 0, "value": NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
        # Its flags are in memory, where a filter cannot look; the C library then takes clone.
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
    ]
    architectures: list[dict[str, Any]] = [
        {"architecture": name, "subArchitectures": []} for name in ("SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64")
    ]
    return json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "archMap": architectures, "syscalls": rules})


def _rule(names: Sequence[str], index: int | None = None, value: int = 0) -> dict[str, Any]:
    """Allow these, whatever their arguments, or where one of them has a value."""
    args = [] if index is None else [{"index": index, "value": value, "op": "SCMP_CMP_EQ"}]
    return {"names": list(names), "action": "SCMP_ACT_ALLOW", "args": args}
