#!/bin/sh
# A real SLURM of one node on this machine, for tests/study/test_slurm.py. Debian, as root, without systemd; no accounting.
#   tests/study/slurm_node.sh install   the packages slurm-wlm and munge
#   tests/study/slurm_node.sh start     munged, slurmctld and slurmd; waits until the node is idle
#   tests/study/slurm_node.sh stop      ends the three that it started
# Its files are in SLURM_NODE_DIR (default /var/tmp/grad_nb_slurm). /etc/slurm/slurm.conf is a link to them while it runs, because jobs
# look for it there; where that file is already there, a cluster is configured, and nothing is started.
set -eu

DIR=${SLURM_NODE_DIR:-/var/tmp/grad_nb_slurm}
export SLURM_CONF="$DIR/slurm.conf"
LINKS="/etc/slurm/slurm.conf /etc/slurm/gres.conf"
HOST=$(hostname -s)

installed() { command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; }

configure() {
    mkdir -p "$DIR/state" "$DIR/spool" "$DIR/log"
    cat >"$DIR/slurm.conf" <<EOF
ClusterName=one
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
MpiDefault=none
ReturnToService=2
MinJobAge=300
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo) Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=$HOST Default=YES MaxTime=INFINITE State=UP
EOF
    echo "NodeName=$HOST Name=gpu File=/dev/null" >"$DIR/gres.conf"
}

ended() { for _ in $(seq 50); do kill -0 "$1" 2>/dev/null || return 0; sleep 0.2; done; kill -9 "$1" 2>/dev/null || true; }

case "${1:-}" in
install)
    installed && exit 0
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurm-wlm munge
    ;;
start)
    installed || { echo "slurm is not installed; run $0 install" >&2; exit 1; }
    for link in $LINKS; do
        [ -e "$link" ] && [ ! -L "$link" ] && { echo "$link is there: a cluster is configured on this machine" >&2; exit 1; }
    done
    configure
    for link in $LINKS; do ln -sfn "$DIR/$(basename "$link")" "$link"; done
    if ! munge -n >/dev/null 2>&1; then
        install -d -o munge -g munge /run/munge
        runuser -u munge -- munged --pid-file=/run/munge/grad_nb.pid
    fi
    slurmctld -c
    slurmd
    for _ in $(seq 60); do
        case "$(sinfo -h -o %t 2>/dev/null)" in idle* | mix* | alloc*) sinfo; exit 0 ;; esac
        sleep 0.5
    done
    echo "the node did not come up; see $DIR/log" >&2
    exit 1
    ;;
stop)
    for pid in "$DIR/slurmd.pid" "$DIR/slurmctld.pid" /run/munge/grad_nb.pid; do
        number=$(cat "$pid" 2>/dev/null) || continue
        kill "$number" 2>/dev/null && ended "$number"
        rm -f "$pid"
    done
    for link in $LINKS; do [ ! -L "$link" ] || rm -f "$link"; done
    ;;
*)
    echo "usage: $0 install|start|stop" >&2
    exit 2
    ;;
esac
