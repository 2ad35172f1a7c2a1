#!/usr/bin/env bash
# slurmlab.sh: a throw-away real Slurm cluster on one host, for tests.
# No systemd, no cgroup, nothing in /etc, everything under DIR; several clusters can run side by side.
#   slurmlab.sh up DIR       start, wait until every node is idle, print "export SLURM_CONF=..."
#   slurmlab.sh down DIR     stop what `up DIR` started (by pid), wait until gone
#   slurmlab.sh status DIR
# Needs: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge  (Debian 12: 22.05.8)
# DIR: absolute, short (unix sockets), every parent not group/world-writable unless sticky (munged checks).
# Knobs (environment):
#   LAB_NODES=2  LAB_CPUS=64  LAB_MEM=512000 (MB)  LAB_GPUS=4 (0: none)  LAB_GPU_TYPE= (e.g. h200)  LAB_FEATURES=
#     (what the nodes claim to have; nothing enforces it: no binding, no memory limit)
#   LAB_NAMES=ip   nodes are called 127.0.0.2, 127.0.0.3, ...: a MASTER_ADDR taken from `scontrol show hostnames` connects
#   LAB_NAMES=n    nodes are called n1, n2, ...: on their own, these do not resolve
#   LAB_NS=1       (with LAB_NAMES=n; needs CAP_SYS_ADMIN) each slurmd in its own UTS + mount namespace:
#                  `hostname` differs per node and n1, n2, ... resolve inside jobs
#   LAB_PARTITIONS="debug" (space-separated; first is default)   LAB_PORT=0 (0: pick free ones)
#   LAB_DBD=1      accounting (sacct) by slurmdbd + MariaDB: also needs the packages slurmdbd mariadb-server; +2..3 s
#   LAB_REQUEUE=1 (0: JobRequeue=0)  LAB_REQUEUE_DELAY=5 (s; least is 5)  LAB_EXTRA=FILE (appended to slurm.conf)  LAB_WAIT=30
set -euo pipefail
die() { echo "slurmlab: $*" >&2; exit 1; }
[ $# -eq 2 ] || die "usage: $0 up|down|status DIR"
cmd=$1; B=$2
case $B in /*) ;; *) die "DIR must be absolute";; esac
PATH=$PATH:/usr/sbin:/sbin

# a pid counts as alive unless gone or a zombie (a container's PID 1 may never reap)
alive() { [ -n "${1:-}" ] && [ -d "/proc/$1" ] && [ "$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null)" != Z ]; }
# ours: the process still is the daemon we started for this DIR (its first environment says so), not a reused pid
ours() { alive "$1" && tr '\0' '\n' <"/proc/$1/environ" 2>/dev/null | grep -qxF "SLURM_CONF=$B/etc/slurm.conf"; }
pid_in() { if [ -s "$1" ]; then tr -dc 0-9 <"$1"; fi; }

stop() {
  local p f pids=() deadline=$((SECONDS + 20))
  [ -d "$B/run" ] || return 0
  # end the jobs first: a stopped slurmd leaves slurmstepd and the job's processes running
  if p=$(pid_in "$B/run/slurmctld.pid"); ours "$p"; then
    for f in $(SLURM_CONF=$B/etc/slurm.conf timeout 5 squeue -h -o %A 2>/dev/null | sort -u); do
      SLURM_CONF=$B/etc/slurm.conf timeout 5 scancel --quiet "$f" 2>/dev/null || true
    done
    while [ $SECONDS -lt $deadline ] && [ -n "$(SLURM_CONF=$B/etc/slurm.conf timeout 5 squeue -h 2>/dev/null)" ]; do sleep 0.1; done
  fi
  for f in "$B"/run/slurmd.*.pid "$B/run/slurmctld.pid" "$B/run/slurmdbd.pid" "$B/run/mariadbd.pid" "$B/run/munged.pid"; do
    p=$(pid_in "$f"); if ours "$p"; then kill -TERM "$p"; else continue; fi
    # the slurmds together; from slurmctld on one after the other (it flushes to slurmdbd, slurmdbd to the database)
    pids+=("$p"); case $f in */slurmd.*) continue;; esac
    for p in "${pids[@]}"; do
      while alive "$p"; do
        [ $SECONDS -lt $deadline ] || { kill -KILL "$p" 2>/dev/null || true; break; }
        sleep 0.02
      done
    done
    pids=()
  done
  rm -f "$B"/run/*.pid "$B"/run/*.sock*
}

case $cmd in
  down) stop; exit 0;;
  status)
    for f in "$B"/run/*.pid; do p=$(pid_in "$f"); ours "$p" && echo "$(basename "$f" .pid) $p"; done
    SLURM_CONF=$B/etc/slurm.conf sinfo -h -N -o '%N %T %C %G %E' | sort -u; exit 0;;
  up) ;;
  *) die "unknown command $cmd";;
esac
for x in slurmctld slurmd munged sbatch; do
  command -v $x >/dev/null || die "$x is missing: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
done

[ ${#B} -le 60 ] || die "DIR is too long (${#B} > 60 characters): unix sockets live under it, and theirs must stay under 108"
N=${LAB_NODES:-2} CPUS=${LAB_CPUS:-64} MEM=${LAB_MEM:-512000} GPUS=${LAB_GPUS:-4} GTYPE=${LAB_GPU_TYPE:-}
FEAT=${LAB_FEATURES:-} NAMES=${LAB_NAMES:-ip} NS=${LAB_NS:-0} PARTS=${LAB_PARTITIONS:-debug}
DBD=${LAB_DBD:-0} RQ=${LAB_REQUEUE_DELAY:-5} WAIT=${LAB_WAIT:-30} ME=$(id -un) H=$(hostname -s)
case $NAMES in ip) name() { echo "127.0.0.$(($1 + 1))"; };; n) name() { echo "n$1"; };; *) die "LAB_NAMES is ip or n";; esac
if [ "$NS" = 1 ]; then unshare -um true 2>/dev/null || die "LAB_NS=1 needs the right to unshare (CAP_SYS_ADMIN)"; fi
stop
rm -rf "$B/ctld" "$B/spool" "$B/log" "$B/db"     # job ids start at 1 each time; KEEP these to recover a queue
mkdir -p "$B"/{etc,run,ctld,log,gpu}; chmod 755 "$B" "$B/run"

port=${LAB_PORT:-0}
busy() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
if [ "$port" = 0 ]; then
  for _ in $(seq 50); do
    port=$((20000 + RANDOM % 10000)); ok=1
    for i in $(seq 0 $((N + 2))); do if busy $((port + i)); then ok=0; fi; done
    [ $ok = 1 ] && break
  done
fi

[ -s "$B/etc/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$B/etc/munge.key")

gres=; if [ "$GPUS" -gt 0 ]; then gres="Gres=gpu:${GTYPE:+$GTYPE:}$GPUS "; fi
{
cat <<X
ClusterName=lab
SlurmctldHost=$H(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$B/run/munge.sock,cred_expire=$RQ
StateSaveLocation=$B/ctld
SlurmdSpoolDir=$B/spool/%n
SlurmctldPidFile=$B/run/slurmctld.pid
SlurmdPidFile=$B/run/slurmd.%n.pid
SlurmctldLogFile=$B/log/slurmctld.log
SlurmdLogFile=$B/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
$(if [ "$DBD" = 1 ]; then
  echo "JobAcctGatherType=jobacct_gather/linux"; echo "JobAcctGatherFrequency=5"
  echo "AccountingStorageType=accounting_storage/slurmdbd"
  echo "AccountingStorageHost=127.0.0.1"; echo "AccountingStoragePort=$((port + N + 1))"
  echo "AccountingStoragePass=$B/run/munge.sock"      # here: where munged listens
else
  echo "JobAcctGatherType=jobacct_gather/none"; echo "AccountingStorageType=accounting_storage/none"
fi)
JobCompType=jobcomp/filetxt
JobCompLoc=$B/log/jobcomp.txt
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
PriorityType=priority/basic
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=${LAB_REQUEUE:-1}
MinJobAge=86400
KillWait=5
UnkillableStepTimeout=60
SlurmctldTimeout=10
SlurmdTimeout=30
CompleteWait=0
MessageTimeout=10
X
if [ "$GPUS" -gt 0 ]; then echo GresTypes=gpu; fi
for i in $(seq 1 "$N"); do
  echo "NodeName=$(name "$i") NodeHostname=$H NodeAddr=127.0.0.1 Port=$((port + i)) Sockets=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM TmpDisk=1000000 ${gres}${FEAT:+Feature=$FEAT }State=UNKNOWN"
done
d=YES; for p in $PARTS; do echo "PartitionName=$p Nodes=ALL Default=$d MaxTime=INFINITE DefaultTime=60 State=UP"; d=NO; done
if [ -n "${LAB_EXTRA:-}" ]; then cat "$LAB_EXTRA"; fi
} >"$B/etc/slurm.conf"
# Nothing here uses cgroups, yet slurmd refuses to start when it cannot load a cgroup plugin (a container with no
# /sys/fs/cgroup, a read-only one, a hybrid one). 22.05 knows no "disabled"; its v1 plugin loads anywhere and stays idle.
case $(slurmd -V | sed 's/[^0-9]*\([0-9]*\.[0-9]*\).*/\1/') in
  2[0-3].*) echo "CgroupPlugin=cgroup/v1";;
  *) echo "CgroupPlugin=disabled";;
esac >"$B/etc/cgroup.conf"
rm -f "$B/etc/gres.conf"
if [ "$GPUS" -gt 0 ]; then
  # slurmd wants one character device per GPU (a plain file, or Count= alone, leaves the node INVAL or
  # CUDA_VISIBLE_DEVICES unset in 22.05); a symlink to /dev/null passes and needs no right to mknod
  for i in $(seq 0 $((GPUS - 1))); do ln -sfn /dev/null "$B/gpu/gpu$i"; done
  echo "Name=gpu ${GTYPE:+Type=$GTYPE }File=$B/gpu/gpu[0-$((GPUS - 1))]" >"$B/etc/gres.conf"
fi

export SLURM_CONF=$B/etc/slurm.conf
fail() { tail -n 20 "$B"/log/*.log "$B"/log/*.out >&2; stop; die "$1"; }
# daemons get their own stdin/stdout/stderr: a caller that reads our pipe must not wait for them
munged --key-file="$B/etc/munge.key" --socket="$B/run/munge.sock" --pid-file="$B/run/munged.pid" \
  --log-file="$B/log/munged.log" --seed-file="$B/run/munged.seed" >"$B/log/munged.out" 2>&1 </dev/null || fail "munged did not start"
if [ "$DBD" = 1 ]; then       # before slurmctld: with no saved state it will not start without slurmdbd
  mkdir -p "$B/db"; my=$B/run/my.sock
  mariadb-install-db --no-defaults --user="$ME" --datadir="$B/db" --skip-test-db --auth-root-authentication-method=normal \
    >"$B/log/mariadb-install.out" 2>&1 </dev/null || fail "mariadb-install-db failed"
  mariadbd --no-defaults --user="$ME" --datadir="$B/db" --socket="$my" --pid-file="$B/run/mariadbd.pid" --port=$((port + N + 2)) \
    --bind-address=127.0.0.1 --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --log-error="$B/log/mariadbd.log" \
    >/dev/null 2>&1 </dev/null &
  for _ in $(seq 200); do if mariadb-admin --no-defaults -u root -S "$my" ping >/dev/null 2>&1; then break; fi; sleep 0.05; done
  mariadb --no-defaults -u root -S "$my" -e "create database slurm_acct_db; create user slurm@'127.0.0.1' identified by 'lab';
    create user slurm@localhost identified by 'lab'; grant all on slurm_acct_db.* to slurm@'127.0.0.1'; grant all on slurm_acct_db.* to slurm@localhost;" \
    || fail "mariadb is not answering"
  (umask 077; cat >"$B/etc/slurmdbd.conf" <<X
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + N + 1))
SlurmUser=$ME
AuthType=auth/munge
AuthInfo=socket=$B/run/munge.sock
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + N + 2))
StorageUser=slurm
StoragePass=lab
StorageLoc=slurm_acct_db
LogFile=$B/log/slurmdbd.log
PidFile=$B/run/slurmdbd.pid
X
  )
  slurmdbd >"$B/log/slurmdbd.out" 2>&1 </dev/null || fail "slurmdbd did not start"
  for _ in $(seq 200); do if busy $((port + N + 1)); then break; fi; sleep 0.05; done
fi
slurmctld >"$B/log/slurmctld.out" 2>&1 </dev/null || fail "slurmctld did not start"
for _ in $(seq 200); do if busy "$port"; then break; fi; sleep 0.02; done   # else slurmd's first registration fails, +1 s
for i in $(seq 1 "$N"); do
  n=$(name "$i"); mkdir -p "$B/spool/$n"
  if [ "$NS" = 1 ]; then
    printf '127.0.0.1 localhost %s\n' "$H" >"$B/etc/hosts.$n"
    for k in $(seq 1 "$N"); do printf '127.0.0.%s %s\n' $((k + 1)) "$(name "$k")" >>"$B/etc/hosts.$n"; done
    # shellcheck disable=SC2016  # for the inner shell
    unshare -um sh -c 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -N "$2"' sh "$B/etc/hosts.$n" "$n" \
      >"$B/log/slurmd.$n.out" 2>&1 </dev/null || fail "slurmd $n did not start"
  else
    slurmd -N "$n" >"$B/log/slurmd.$n.out" 2>&1 </dev/null || fail "slurmd $n did not start"
  fi
done
end=$((SECONDS + WAIT)) begun=$SECONDS
# (sinfo -N prints a node once per partition)
until [ "$(sinfo -h -N -o '%N %t' 2>/dev/null | sort -u | grep -c ' idle$')" = "$N" ]; do
  [ $SECONDS -lt $end ] || { sinfo -h -N -o '%N %T %E' | sort -u >&2 || true; fail "not idle within ${WAIT}s"; }
  [ $SECONDS -lt $((begun + 3)) ] || ours "$(pid_in "$B/run/slurmctld.pid")" || fail "slurmctld died"
  sleep 0.05
done
echo "export SLURM_CONF=$SLURM_CONF"
