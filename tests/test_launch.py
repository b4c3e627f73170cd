"Launcher cells: two gloo processes on the CPU, their output, their failures, and commands that only print."

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from llama2lib.launch import first_failure, launch, one_line_errors, side_by_side, slurm_script, torchrun_arguments
from llama2lib.recipes import ROOT


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("LLAMA2_LAUNCH", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def script(tmp_path):
    def write(code: str) -> str:
        path = tmp_path / "job.py"
        path.write_text(textwrap.dedent(code))
        return str(path)

    return write


def test_two_processes_reduce_and_the_output_is_live(script, monkeypatch, tmp_path):
    "Rank 0 waits for a file that is made only once its first line has been seen: output at the end would hang."
    go = tmp_path / "go"
    path = script("""
        import os, sys, time, pathlib, torch, torch.distributed as dist
        import llama2lib.recipes
        dist.init_process_group("gloo")
        x = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(x)
        if dist.get_rank() == 0:
            print("sum", x.item(), "threads", os.environ["OMP_NUM_THREADS"], "note", os.environ["NOTE"])
            until = time.time() + 20
            while not pathlib.Path(sys.argv[1]).exists():
                assert time.time() < until, "nobody read the first line"
                time.sleep(0.05)
            print("done")
        dist.destroy_process_group()
    """)
    lines = []

    class Cell:
        def write(self, text):
            lines.append(text)
            if "sum" in text and "note" in text and not text.startswith("$"):
                go.touch()

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Cell())
    assert launch(path, str(go), env={"NOTE": "a b"})
    text = "".join(lines)
    threads = max(1, os.cpu_count() // 2)
    assert f"[rank0]:sum 3.0 threads {threads} note a b\n" in text
    assert text.index("sum") < text.index("[rank0]:done")
    assert text.startswith(f"$ NOTE='a b' OMP_NUM_THREADS={threads} torchrun --standalone --nproc-per-node=2 {path} ")


@pytest.mark.parametrize("record", [True, False])
def test_a_failure_shows_the_rank_that_failed_first(script, record, capsys):
    "Rank 1 fails; rank 0, waiting for it, fails a moment later because its peer is gone."
    path = script(f"""
        import torch, torch.distributed as dist
        from torch.distributed.elastic.multiprocessing.errors import record
        def broken():
            raise KeyError("shard 17 is missing")
        def main():
            dist.init_process_group("gloo")
            dist.barrier()
            if dist.get_rank() == 1:
                broken()
            dist.all_reduce(torch.ones(1))
        {"main = record(main)" if record else ""}
        main()
    """)
    with pytest.raises(RuntimeError) as caught:
        launch(path)
    text = str(caught.value)
    assert "rank 1 failed:" in text and "in broken" in text and "shard 17 is missing" in text
    assert "Root Cause" not in text + capsys.readouterr().out and "rank 0" not in text


def test_a_death_without_traceback_still_says_what_torchrun_saw(script):
    with pytest.raises(RuntimeError, match=r"(?s)torchrun failed.*(SIGKILL|-9)"):
        launch(script("import os, signal\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)"))


def test_no_such_module():
    with pytest.raises(RuntimeError, match=r"No module named .*no_such_module"):
        launch("llama2lib.no_such_module", nproc=1)


def words(printed: str) -> list[str]:
    "What a shell makes of the arguments of a printed command."
    command = printed.removeprefix("$ ").replace("torchrun", "printf '%s\\0'", 1)
    run = subprocess.run(["bash", "-c", command], text=True, check=True, capture_output=True,
                         env=os.environ | {"HEAD_NODE": "node0"})  # fmt: skip
    return run.stdout.split("\0")[:-1]


def test_gpu_commands_wait_for_consent_and_the_printed_command_is_the_one_that_runs(script, monkeypatch, capfd):
    path = script("import os, sys\nprint(os.environ['A'], sys.argv[1:])")
    arguments = ["it's", "$HOME", "", 'a "b"']
    assert launch(path, *arguments, nproc=1, gpus=True, env={"A": "x y"}) is False
    first = capfd.readouterr().out
    assert "LLAMA2_LAUNCH=1" in first and "[rank0]" not in first and "OMP_NUM" not in first
    monkeypatch.setenv("LLAMA2_LAUNCH", "1")
    assert launch(path, *arguments, nproc=1, gpus=True, env={"A": "x y"}) is True
    command, output = capfd.readouterr().out.splitlines()
    assert command == first.splitlines()[0] and command.startswith("$ A='x y' torchrun ")
    assert words(command) == torchrun_arguments(path, *arguments, nproc=1)
    assert output == f"[rank0]:x y {arguments}"


def test_several_nodes_only_print(monkeypatch, capfd):
    monkeypatch.setenv("LLAMA2_LAUNCH", "1")
    assert launch("llama2lib.pretrain", "--model", "70B", nproc=8, nnodes=4, gpus=True) is False
    shell = words(capfd.readouterr().out.splitlines()[0])
    assert shell[0] == "--nnodes=4" and "--rdzv-endpoint=node0:29500" in shell
    assert shell[-5:] == ["--nproc-per-node=8", "-m", "llama2lib.pretrain", "--model", "70B"]


def test_an_interrupt_leaves_no_process_behind(script, tmp_path):
    path = script("""
        import os, pathlib, sys, time
        pathlib.Path(sys.argv[1], os.environ["RANK"] + ".pid").write_text(str(os.getpid()))
        time.sleep(120)
    """)
    heed = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job ignores it
    code = f"{heed}\nfrom llama2lib.launch import launch\nlaunch({path!r}, {str(tmp_path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)},
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    until = time.time() + 30
    while len(pids := [p for p in tmp_path.glob("*.pid") if p.read_text()]) < 2:
        assert time.time() < until and parent.poll() is None
        time.sleep(0.05)
    pids = [int(path.read_text()) for path in pids]
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_first_failure_of_no_logs(tmp_path):
    assert first_failure(tmp_path) == ""


def test_a_slurm_script_starts_one_torchrun_on_each_node(tmp_path):
    "Run by a shell whose srun and scontrol are stand-ins that show what they were given."
    (tmp_path / "scontrol").write_text("#!/bin/bash\nprintf 'node7\\nnode8\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    for tool in ("scontrol", "srun"):
        (tmp_path / tool).chmod(0o755)
    text = slurm_script("llama2lib.pretrain", "7B", "--data", "my shards", nnodes=2, nproc=8)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]"}
    environment["SLURM_JOB_ID"] = "77"
    ran = subprocess.run(["bash"], input=text, capture_output=True, text=True, env=environment)
    words = ran.stdout.split("\n")
    assert ran.returncode == 0 and "--rdzv-endpoint=node7:29500" in words and "--nnodes=2" in words
    assert "--rdzv-id=77" in words  # two jobs whose head is one node do not meet
    assert words[-5:-1] == ["llama2lib.pretrain", "7B", "--data", "my shards"] and "--max-restarts=3" in words
    assert "#SBATCH --nodes=2" in text and "#SBATCH --gpus-per-node=8" in text


@pytest.mark.parametrize(
    ("module", "name"), [("llama2lib.pretrain", "pretrain"), ("train.py", "train"), ("my jobs/run.7B.py", "run.7B")]
)
def test_a_slurm_job_is_named_after_its_module_or_script(module, name):
    assert f"#SBATCH --job-name={name}\n" in slurm_script(module, nnodes=2)


def test_failed_processes_are_started_again(script):
    path = script("""
        import os, sys
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        print("attempt", attempt)
        sys.exit(attempt == 0)
    """)
    assert launch(path, nproc=2, max_restarts=1)
    assert "--max-restarts=2" in torchrun_arguments("a.py", max_restarts=2)


def seen_by_a_worker(number: int):
    from tqdm import tqdm

    return number, os.getpid(), torch.get_num_threads(), tqdm([]).disable


def failing(number: int, folder):
    if number == 1:
        raise ValueError("the second one")
    time.sleep(0.3)
    (folder / str(number)).touch()


def test_calls_run_side_by_side_in_order_on_one_thread_each(capfd, monkeypatch):
    monkeypatch.setattr("joblib._parallel_backends.cpu_count", lambda *_: 8)  # joblib by itself would give each four
    found = side_by_side([(seen_by_a_worker, number) for number in (3, 1, 2)], "numbers", 2)
    assert [row[0] for row in found] == [3, 1, 2] and os.getpid() not in {row[1] for row in found}
    assert {row[2:] for row in found} == {(1, True)}
    assert "numbers: 100%" in (told := capfd.readouterr().err) and "3/3" in told


def test_an_error_of_a_call_is_raised_and_ends_the_others(tmp_path):
    with pytest.raises(ValueError, match="the second one"):
        side_by_side([(failing, number, tmp_path) for number in range(40)], "numbers", 2)
    assert len(list(tmp_path.iterdir())) < 20


def test_a_script_that_runs_calls_side_by_side_is_not_run_again(script):
    "As it would be by multiprocessing, where a script has no main guard."
    code = """
        from math import sqrt
        from llama2lib.launch import side_by_side
        print("once", side_by_side([(sqrt, 4), (sqrt, 9)], "roots", 2))
    """
    ran = subprocess.run([sys.executable, script(code)], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and ran.stdout == "once [2.0, 3.0]\n"


@pytest.mark.parametrize("error", [FileNotFoundError("x.jsonl"), ValueError("x.jsonl"), ImportError("x.jsonl")])
def test_an_error_that_the_user_can_mend_ends_a_command_with_one_line(error, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    @one_line_errors()
    def cli():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli()
    assert ended.value.code == f"{type(error).__name__}: x.jsonl"
    monkeypatch.setenv("RANK", "1")  # torchrun wants the traceback
    with pytest.raises(type(error)):
        cli()


def test_errors_that_are_ours_keep_their_traceback_unless_they_are_named():
    for error in (RuntimeError, IndexError, AssertionError):
        with pytest.raises(error), one_line_errors():
            raise error
        with pytest.raises(SystemExit), one_line_errors(error):
            raise error
