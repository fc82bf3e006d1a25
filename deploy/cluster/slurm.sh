#!/bin/sh
#SBATCH --job-name=sbtk-index
#SBATCH --array=1-4
#SBATCH --cpus-per-task=2
#SBATCH --mem=2G
#SBATCH --requeue
#
# Indexes one folder of photos in an array of jobs, each with its own part; then merge the parts:
#
#   export PHOTOS=/data/photos GALLERIES=/data/galleries
#   index=$(sbatch --parsable --export=ALL slurm.sh)
#   sbatch --dependency="afterok:$index" --export=ALL --cpus-per-task=2 --mem=4G \
#       --wrap='sbtk merge "$GALLERIES"/shard-*.sbtk --gallery "$GALLERIES/all.sbtk"'
#
# For N jobs, change --array to 1-N. A requeued job continues its part. To repeat some jobs only, say
# what N is: sbatch --array=3 --export=ALL,SHARDS=4 slurm.sh

shard=$SLURM_ARRAY_TASK_ID
sbtk index "$PHOTOS" --shard "$shard/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}" \
    --gallery "$GALLERIES/shard-$shard.sbtk"
code=$?
# Exit code 3: some files cannot be read, and are listed in the gallery's failures.jsonl.
test "$code" = 3 || exit "$code"
