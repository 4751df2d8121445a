#!/usr/bin/env bash
# A throw-away SLURM cluster on this machine, for trying sweeps and for the tests: real daemons, two nodes that are
# both localhost, GPUs that are not there. No systemd, no cgroups, nothing outside DIR; it starts in a second.
#
#   scripts/slurm-local.sh install       Debian's and Ubuntu's packages (as root)
#   scripts/slurm-local.sh start DIR     start what does not run yet
#   eval "$(scripts/slurm-local.sh env DIR)"     then sbatch, squeue and largebatch use it
#   scripts/slurm-local.sh status DIR
#   scripts/slurm-local.sh stop DIR      end its jobs and its daemons, and no others
#
# DIR is absolute and short: sockets lie in it. Partitions: main, and low, whose jobs main's requeue.
# From the environment: NODES=2 CPUS=16 GPUS=8 (of a node), ACCOUNTING=1 for sacct (install and start it so).
set -euo pipefail

command=${1:-}
dir=${2:-}
nodes=${NODES:-2} cpus=${CPUS:-16} gpus=${GPUS:-8} accounting=${ACCOUNTING:-0}

usage() {
  sed -n '2,/^set/ s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

patiently() { # command…: until it succeeds, for at most 30 s
  local left=300
  until "$@" >/dev/null 2>&1; do
    ((left-- > 0)) || { echo "slurm-local: waited in vain for: $*" >&2; return 1; }
    sleep 0.1
  done
}

# A pid file outlives its process, and the number may be another's by now: ours has DIR among its words or variables.
process_of() { # name
  local pid
  pid=$(cat "$dir/run/$1.pid" 2>/dev/null) || return 0
  if cat "/proc/$pid/cmdline" "/proc/$pid/environ" 2>/dev/null | grep -qaF "$dir/"; then echo "$pid"; fi
}
runs() { [[ -n $(process_of "$1") ]]; }
gone() { [[ ! -e /proc/$1 || $(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) == Z* ]]; }
end() { # pid
  kill -TERM "$1" 2>/dev/null || return 0
  patiently gone "$1" || kill -KILL "$1"
}

free_ports() { # count: the first of so many ports in a row on which nothing listens
  local base port taken
  for ((base = 17000; base < 30000; base += 20)); do
    taken=
    for ((port = base; port < base + $1; port++)); do
      if (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; then taken=1; break; fi
    done
    [[ -n $taken ]] || { echo "$base"; return; }
  done
  echo "slurm-local: no free ports" >&2
  return 1
}

configure() {
  mkdir -p "$dir"/{etc,run,log,state,dev}
  chmod 755 "$dir" "$dir"/*
  (umask 077 && head -c 1024 /dev/urandom >"$dir/etc/munge.key")
  local port host user node i
  port=$(free_ports $((nodes + 2))) host=$(hostname -s) user=$(id -un)
  cat >"$dir/etc/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as its credential lives: 120 s, where nothing is said.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
# Nodes may have more processors than this machine.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
# Look for work every second or so; clusters of real size wait longer.
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=100000
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A job that is preempted gets the signal of its --signal first.
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
MaxArraySize=1001
# A request that no node can meet is refused, where it would wait for ever.
EnforcePartLimits=ALL
KillWait=5
ReturnToService=2
# A machine that is busy training answers late.
MessageTimeout=60
SlurmctldTimeout=60
SlurmdTimeout=60
MinJobAge=300
GresTypes=gpu
END
  for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$dir/spool-n$i"
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1 + i)) CPUs=$cpus CoresPerSocket=$cpus" \
      "RealMemory=16000 Gres=gpu:$gpus"
  done >>"$dir/etc/slurm.conf"
  cat >>"$dir/etc/slurm.conf" <<END
PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=10
PartitionName=low Nodes=n[1-$nodes] MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=20
END
  # A device file must be a device; a link to one will do.
  for ((i = 0; i < gpus; i++)); do ln -sfn /dev/null "$dir/dev/gpu$i"; done
  echo "NodeName=n[1-$nodes] Name=gpu File=$dir/dev/gpu[0-$((gpus - 1))]" >"$dir/etc/gres.conf"
  # Without this slurmd asks systemd for a control group, and there may be no systemd.
  echo "CgroupPlugin=cgroup/v1" >"$dir/etc/cgroup.conf"
  if ((accounting)); then configure_accounting "$((port + 1))"; fi
}

configure_accounting() { # port
  cat >>"$dir/etc/slurm.conf" <<END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$1
AccountingStoragePass=$dir/run/munge.socket
AccountingStorageTRES=gres/gpu
END
  (umask 077 && cat >"$dir/etc/slurmdbd.conf") <<END
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$1
SlurmUser=$(id -un)
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
END
}

start_accounting() {
  local socket=$dir/run/mariadb.socket
  if ! runs mariadbd; then
    [[ -d $dir/db ]] || mariadb-install-db --no-defaults --user="$(id -un)" --datadir="$dir/db" \
      --auth-root-authentication-method=normal --skip-test-db >"$dir/log/mariadb-install.log" 2>&1
    setsid mariadbd --no-defaults --user="$(id -un)" --datadir="$dir/db" --socket="$socket" --skip-networking \
      --pid-file="$dir/run/mariadbd.pid" --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
      </dev/null >"$dir/log/mariadbd.log" 2>&1 &
    patiently mariadb-admin --no-defaults --user=root --socket="$socket" ping
  fi
  runs slurmdbd || MYSQL_UNIX_PORT=$socket slurmdbd
  patiently sacctmgr --noheader show cluster
  sacctmgr --noheader show cluster format=cluster | grep -qw local || sacctmgr --immediate add cluster local >/dev/null
}

start() {
  local name
  for name in munged slurmctld slurmd sbatch; do
    command -v "$name" >/dev/null || { echo "slurm-local: there is no $name here: $0 install" >&2; exit 1; }
  done
  [[ -f $dir/etc/slurm.conf ]] || configure
  if ! runs munged; then
    munged --force --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
      --log-file="$dir/log/munged.log" --seed-file="$dir/state/munged.seed" >>"$dir/log/munged.log" 2>&1
  fi
  if [[ -f $dir/etc/slurmdbd.conf ]]; then start_accounting; fi
  runs slurmctld || slurmctld -f "$SLURM_CONF" >>"$dir/log/slurmctld.log" 2>&1
  local spool
  for spool in "$dir"/spool-*; do
    local node=${spool##*-}
    runs "slurmd-$node" || slurmd -f "$SLURM_CONF" -N "$node" >>"$dir/log/slurmd-$node.log" 2>&1
  done
  patiently all_nodes_serve
}

all_nodes_serve() {
  local all=("$dir"/spool-*)
  [[ $(sinfo --noheader --partition=main --states=idle,mixed,allocated --Node | wc -l) == "${#all[@]}" ]]
}

stop() {
  if runs slurmctld; then # jobs first: a step that has lost its slurmd would stay behind
    squeue --noheader --format=%A | sort -u | xargs --no-run-if-empty scancel --signal=KILL || true
    squeue --noheader --format=%A | sort -u | xargs --no-run-if-empty scancel || true
    no_job_left() { [[ -z $(squeue --noheader) ]]; }
    patiently no_job_left || true
  fi
  local name pid environment
  for environment in /proc/[0-9]*/environ; do # steps whose slurmd was killed
    if [[ $(cat "${environment%environ}comm" 2>/dev/null) == slurmstepd ]] && grep -qaF "$dir/" "$environment" 2>/dev/null; then
      pid=${environment#/proc/} pid=${pid%/environ}
      end "$pid"
    fi
  done
  for name in $(cd "$dir/run" && ls ./*.pid 2>/dev/null | sed 's|^\./||; s|\.pid$||' | sort --reverse); do
    pid=$(process_of "$name")
    [[ -z $pid ]] || end "$pid"
    rm -f "$dir/run/$name.pid"
  done
}

case $command in
  install)
    packages=(slurm-wlm munge)
    if ((accounting)); then packages+=(slurmdbd mariadb-server); fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
    exit
    ;;
  start | env | status | stop)
    [[ $dir == /* && ${#dir} -lt 80 ]] || usage
    ;;
  *) usage ;;
esac

PATH=$PATH:/usr/sbin
export SLURM_CONF=$dir/etc/slurm.conf
trap 'echo "slurm-local: $command failed. The logs in $dir/log end so:" >&2; tail -n 5 "$dir"/log/*.log >&2' ERR
case $command in
  start) start ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  status) scontrol ping && sinfo --Node --long ;;
  stop) stop ;;
esac
