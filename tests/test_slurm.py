"""A grid on a real Slurm cluster of two nodes on this machine, which the tests start and end: a node dies, the driver dies."""
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
from project import SLOW, n_rounds_written, nothing_twice, papermills, until

CONF = Path("/etc/slurm/slurm.conf")  # jobs of Snakemake find no other
GRES = CONF.with_name("gres.conf")
MARK = "ClusterName=deltaf1altest"
SLURM = """{mark}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
ReturnToService=2
JobRequeue=1
MinJobAge=3600
SlurmdTimeout=5
KillWait=5
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000 Gres=gpu:fake:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000 Gres=gpu:fake:1
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
PartitionName=short Nodes=n1,n2 MaxTime=1 State=UP
"""


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def kill_tree(pid):
    "A process and all that came of it."
    try:
        process = psutil.Process(pid)
        for p in [process, *process.children(recursive=True)]:
            p.kill()
    except psutil.NoSuchProcess:
        pass


class Cluster:
    def __init__(self, folder):
        self.folder = folder
        (folder / "state").mkdir(parents=True)
        CONF.parent.mkdir(exist_ok=True)
        CONF.write_text(SLURM.format(mark=MARK, host=socket.gethostname().split(".")[0], folder=folder, ports=free_ports(3)))
        for node in ("n1", "n2"):  # Slurm takes any character device for a GPU
            os.mknod(folder / f"gpu-{node}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        GRES.write_text("".join(f"NodeName={node} Name=gpu Type=fake File={folder}/gpu-{node}\n" for node in ("n1", "n2")))
        self.daemons = {"slurmctld": self.daemon("slurmctld", "-c", "-D")}
        for node in ("n1", "n2"):
            self.start(node)
        until(lambda: self.say("sinfo", "-h", "-o", "%D %t", "-p", "main").strip() == "2 idle", seconds=60)

    def daemon(self, *command):
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def start(self, node):
        self.daemons[node] = self.daemon("slurmd", "-D", "-N", node)

    def say(self, *command):
        return subprocess.run(command, text=True, capture_output=True, timeout=60).stdout

    def jobs(self, node):
        "The ids of the jobs that run there."
        return self.say("squeue", "-h", "-r", "-t", "R", "-w", node, "-o", "%A").split()

    def lose(self, node):
        "Kill its daemon, the steps of its jobs and what they run, as when its power goes."
        jobs = self.jobs(node)
        self.daemons.pop(node).kill()
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if any(line.startswith(f"slurmstepd: [{job}.") for job in jobs):
                kill_tree(process.pid)
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_JOB_ID") in jobs:
                    process.kill()
            except psutil.Error:
                continue
        return jobs

    def end(self):
        self.say("scancel", "--me")
        for process in self.daemons.values():
            process.terminate()
        for process in psutil.process_iter(["cmdline"]):
            if " ".join(process.info["cmdline"] or []).startswith("slurmstepd: ["):
                kill_tree(process.pid)
        for process in self.daemons.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        if CONF.exists() and CONF.read_text().startswith(MARK):
            CONF.unlink()
            GRES.unlink(missing_ok=True)


@pytest.fixture
def cluster(long, tmp_path):
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))):
        pytest.skip("Slurm is not installed; on Debian: slurmctld slurmd slurm-client")
    if os.geteuid():
        pytest.skip("starting Slurm needs root")
    if CONF.exists() and not CONF.read_text().startswith(MARK):
        pytest.skip(f"{CONF} is of another cluster")
    found = None
    try:
        found = Cluster(tmp_path / "slurm")
        yield found
    finally:
        if found:
            found.end()


def on_slurm(project, **resources):
    "The project's own profile, with a partition, and less patience."
    profile = project.folder / "nbs/grid/slurm/config.yaml"
    options = yaml.safe_load(profile.read_text())
    options |= {"default-resources": {"slurm_partition": "main", **resources}, "latency-wait": 15, "slurm-init-seconds-before-status-checks": 5, "seconds-between-status-checks": 2}
    profile.write_text(yaml.safe_dump(options))


STUDY = {**SLOW, "query": ["margin", "random"], "epsilon": 1.0, "k": 2, "job": {"mem_mb": 900, "runtime": 20}}


def test_a_node_dies_and_then_the_driver(project, cluster):
    "Every run finishes, nothing is computed twice; the restarted driver cancels the jobs of the dead one, and only those."
    project.study(**{**STUDY, "n_initial": 48, "n_query": 24, "max_epochs": 150, "job": {"mem_mb": 900, "runtime": 20, "gpu": 1}})
    on_slurm(project)
    driver = project.start("experiments", "slurm")
    until(lambda: n_rounds_written(project) >= 2 and cluster.jobs("n1") and cluster.jobs("n2"), driver, 240)
    assert all(line in cluster.say("scontrol", "show", "job", cluster.jobs("n2")[0]) for line in ("TresPerJob=gres:gpu:1", "MinMemoryNode=900M", "TimeLimit=00:20:00"))
    lost = cluster.lose("n1")
    until(lambda: set(lost) & set(cluster.jobs("n2")), driver, 240)  # requeued, once the other one has something to spare
    so_far = n_rounds_written(project)
    until(lambda: n_rounds_written(project) > so_far, driver, 240)
    foreign = cluster.say("sbatch", "--parsable", "--hold", "-D", "/tmp", "--mem", "10", "--wrap", "sleep 900").strip()
    driver.kill()
    driver.wait()
    assert [job for job in cluster.jobs("n2") if job != foreign], "jobs go on without the driver"
    status, said = project.call("experiments", "slurm")
    assert status == 0 and "Slurm jobs of a driver that died; their rounds are kept." in said, said
    assert len(project.folders()) == 4 and all((folder / "summary.json").exists() for folder in project.folders())
    nothing_twice(project)
    assert cluster.say("squeue", "-h", "-j", foreign, "-o", "%T").strip() == "PENDING", "the job of somebody else is left alone"
    log = (cluster.folder / "slurmctld.log").read_text()
    assert all(f"requeue job JobId={job}" in log or f"Requeuing JobId={job}" in log or f"Requeue JobId={job}" in log for job in lost), log
    status, said = project.call("experiments", "slurm")
    assert status == 0 and "nothing to do" in said


def test_what_the_cluster_does_not_have(project, cluster):
    project.study(**STUDY)
    on_slurm(project, slurm_partition="gpus")
    status, said = project.call("experiments", "slurm")
    assert status == 1 and said.strip() == "slurm_partition of the profile is 'gpus'; allowed are main, short", said
    on_slurm(project, slurm_partition="short")
    status, said = project.call("experiments", "slurm")
    assert status == 1 and said.strip() == "runtime of study it is 20 minutes; allowed in the partition short is at most 1", said


def test_a_run_longer_than_the_partition_allows(project, cluster):
    "Slurm ends it after a minute, and it goes on from its last round."
    project.study(query="margin", strategy="retrain", n_rounds=6, job={"mem_mb": 900, "runtime": 1})
    on_slurm(project, slurm_partition="short")
    project.environment["NAP"] = "7"  # seconds after each of 13 rounds and questions: more than a minute
    status, said = project.call("experiments", "slurm")
    assert status == 0, said
    written = project.written()
    assert len(written) == len(set(written)) == 13
    assert "Time limit exhausted for JobId=1" in (cluster.folder / "slurmctld.log").read_text()
