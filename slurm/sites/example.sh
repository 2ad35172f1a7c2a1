# shellcheck shell=bash
# A site profile: SITE=example bash slurm/gpt2_xl_stage1.sh reads it before slurm/site.sh. Copy it to sites/NAME.sh, one per cluster
# or per partition. A value set in the environment still wins.
: "${SITE_PARTITION:=gpu}"
: "${SITE_GPU_TYPE:=h100}"
: "${SITE_TIME:=08:00:00}"
