"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "torchrun_arguments",
    "RESTARTABLE",
    "slurm_script",
    "first_failure",
    "launch",
    "side_by_side",
    "one_line_errors",
]


# ---------- chapters/10_toolbox.py · Launch: several processes from a cell

import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from llama2lib.recipes import ROOT


def torchrun_arguments(module: str, *args, nproc: int = 2, nnodes: int = 1, max_restarts: int = 0) -> list[str]:
    """Arguments of torchrun for a module (`llama2lib.sft`) or a script (a path that ends in .py).

    One node finds a free port by itself. With more, the same command is started on every node, and they meet at port
    29500 of `$HEAD_NODE`, which the shell fills in. After a failure all processes are started again, at most
    `max_restarts` times.
    """
    meeting = ["--standalone"]
    if nnodes > 1:
        meeting = [f"--nnodes={nnodes}", "--rdzv-backend=c10d", "--rdzv-id=llama2", "--rdzv-endpoint=$HEAD_NODE:29500"]
    again = [f"--max-restarts={max_restarts}"] if max_restarts else []
    program = [module] if module.endswith(".py") else ["-m", module]
    return [*meeting, f"--nproc-per-node={nproc}", *again, *program, *map(str, args)]


# torchrun otherwise keeps one store over its restarts, in which new processes find the addresses of dead ones
RESTARTABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def slurm_script(module: str, *args, nnodes: int, nproc: int = 8, hours: int = 24, max_restarts: int = 3) -> str:
    "A Slurm batch script, for `sbatch`: one torchrun on each of `nnodes` nodes of `nproc` GPUs, meeting at the first."
    words = torchrun_arguments(module, *args, nproc=nproc, nnodes=nnodes, max_restarts=max_restarts)
    words = [word.replace("--rdzv-id=llama2", "--rdzv-id=$SLURM_JOB_ID") for word in words]
    command = " ".join(f'"{word}"' if word.startswith("--rdzv") else shlex.quote(word) for word in words)
    name = Path(module).stem if module.endswith(".py") else module.rpartition(".")[2]
    return "\n".join([
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={nnodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={nproc}",
        "#SBATCH --exclusive",
        f"#SBATCH --time={hours}:00:00",
        "#SBATCH --requeue",
        *(f"export {name}={value}" for name, value in RESTARTABLE.items()),
        'export HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"srun --kill-on-bad-exit=1 torchrun {command}",
        "",
    ])  # fmt: skip

import json


def first_failure(logs: Path) -> str:
    "The traceback of the rank that failed first, from a `--log-dir` of torchrun; '' if no rank left one."
    errors = sorted(logs.glob("**/error.json"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        message = json.loads(errors[0].read_text("utf-8"))["message"]
        text = message if isinstance(message, str) else message["extraInfo"]["py_callstack"]
        return f"rank {errors[0].parent.name} failed:\n{text.strip()}"
    for path in sorted(logs.glob("**/stderr.log"), key=lambda path: path.stat().st_mtime_ns):
        text = path.read_text("utf-8", "replace")
        if "Traceback (most recent call last)" in text:
            return f"rank {path.parent.name} failed:\n{text[text.index('Traceback') :].strip()}"
    return ""


def launch(
    module: str,
    *args,
    nproc: int = 2,
    nnodes: int = 1,
    gpus: bool = False,
    env: dict | None = None,
    max_restarts: int = 0,
) -> bool:
    """Print the torchrun command for a module or script, and run it if this machine can; True if it ran.

    CPU commands on one node run; with `gpus`, only if `LLAMA2_LAUNCH=1`; on several nodes, never (a cell is on one).
    `env` is added to the environment. Output appears as it is written, each line with its rank; the working folder is
    the repository root. RuntimeError, with the traceback of the first rank that failed, if the command fails; an
    interrupt stops the processes.
    """
    added = {key: str(value) for key, value in (env or {}).items()} | (RESTARTABLE if max_restarts else {})
    if not gpus and "OMP_NUM_THREADS" not in os.environ:  # the processes share the cores
        added.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // nproc)))
    arguments = torchrun_arguments(module, *args, nproc=nproc, nnodes=nnodes, max_restarts=max_restarts)
    words = [f"{key}={shlex.quote(value)}" for key, value in added.items()]
    words += ["torchrun", *(f'"{word}"' if "$HEAD_NODE" in word else shlex.quote(word) for word in arguments)]
    print("$", " ".join(words))
    if nnodes > 1:
        print(f"Not run here: start it on each of the {nnodes} nodes.")
        return False
    if gpus and os.environ.get("LLAMA2_LAUNCH") != "1":
        print(f"Not run here: it needs {nproc} GPU{'s' * (nproc > 1)}. Where they are, set LLAMA2_LAUNCH=1.")
        return False
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with TemporaryDirectory(prefix="torchrun-") as logs:
        flags = ["--log-dir", logs, "--tee=3", "--role=rank"]  # files for us, a copy for the cell, lines as "[rank0]:"
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *flags, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | added,
            start_new_session=True,  # an interrupt reaches this process, which then stops the others in order
        )  # fmt: skip
        try:
            tail = []
            for line in process.stdout:
                if line.startswith("[rank"):  # torchrun's own lines matter only if no rank explains a failure
                    print(line, end="", flush=True)
                tail = [*tail[-40:], line]
            code = process.wait()
        except BaseException:
            process.terminate()  # torchrun stops its workers, by force after 30 s
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        if code:
            raise RuntimeError(f"{module}: {first_failure(Path(logs)) or 'torchrun failed:' + chr(10) + ''.join(tail)}")
    return True


# ---------- chapters/10_toolbox.py · Side by side

from collections.abc import Sequence
from unittest.mock import patch

from tqdm import tqdm


def side_by_side(calls: Sequence[tuple], title: str, workers: int | None = None) -> list:
    """Results of calls, each a function and its arguments, in order; several at a time, in processes of one thread.

    Functions are those that another process can import; what they take and return is pickled. title: of the one
    progress bar. workers: processes, by default one for each core; a single one, as for a single call, is this process
    with all its threads. The longest calls should come first. The first error of a call is raised here, and no other
    call begins.
    """
    from joblib import Parallel, delayed, parallel_config

    workers = min(workers or os.cpu_count(), len(calls))
    silent = patch.dict(os.environ, TQDM_DISABLE="1")  # the processes show no bars of their own
    with silent, parallel_config("loky", n_jobs=workers, inner_max_num_threads=1):
        results = Parallel(return_as="generator")(delayed(function)(*arguments) for function, *arguments in calls)
        return [*tqdm(results, total=len(calls), desc=title)]


# ---------- chapters/10_toolbox.py · Errors of a command

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors(*more: type[Exception]) -> Iterator[None]:
    """Errors that a user can mend (files, values, packages, lost gradients; `more`) end the program with one line.

    Under torchrun they are raised: it wants to know which rank failed where.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, FloatingPointError, *more) as error:
        if "RANK" in os.environ:
            raise
        raise SystemExit(f"{type(error).__name__}: {error}") from None
