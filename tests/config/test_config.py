from dataclasses import replace

import pytest

from largebatch.base.errors import UserError
from largebatch.base.numbers import divisors
from largebatch.config.run import Config
from largebatch.runtime.placement import Hardware, place

CPU = Hardware(cores=8, gpus=0, mps=False, bf16=False)
GPUS = Hardware(cores=64, gpus=8, mps=False, bf16=True)


def test_an_override_of_k_moves_the_rate_and_never_n(compose):
    configs = [compose("dataset=fashion_mnist", f"k={k}") for k in (1, 8, 32, 256)]
    assert [(config.reference_rate, config.n) for config in configs] == [(0.0125, 32), (0.1, 32), (0.4, 32), (3.2, 32)]


def test_an_override_of_k_moves_an_experiments_rate(compose):
    config = compose("experiment=imagenet_1h", "k=512")
    assert (config.reference_rate, config.n, config.iterations_per_epoch(1281167)) == (6.4, 32, 78)


def test_the_papers_run(compose):
    config = compose("experiment=imagenet_1h")
    rates = config.rates(1281167)
    assert (config.minibatch, config.reference_rate, config.iterations_per_epoch(1281167)) == (8192, 3.2, 156)
    assert (rates.rate_at(0), rates.rate_at(780), rates.warming) == (0.1, 3.2, 780)
    assert rates.milestone_iterations == (4680, 9360, 12480)
    assert config.total_iterations(1281167) == 14040


def test_defaults_scale_the_papers_epochs(compose):
    config = compose("epochs=18")
    assert config.milestones == (6.0, 12.0, 16.0)
    assert config.warmup_epochs == 1.0
    assert compose("epochs=90").milestones == (30.0, 60.0, 80.0)
    assert compose("warmup=none").warmup_epochs == 0.0


def test_iterations_end_a_run_early_and_leave_the_schedule(compose):
    short, whole = compose("iterations=3"), compose()
    assert short.total_iterations(1437) == 3
    assert short.rates(1437) == whole.rates(1437)


def test_a_configuration_survives_its_own_record(compose):
    config = compose("experiment=imagenet_1h", "seed=3")
    assert Config.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize(
    "override",
    [
        "device=cpu",
        "processes=2",
        "workers_per_pass=4",
        "threads=3",
        "compile=true",
        "channels_last=true",
        "deterministic=true",
        "dataset.root=/elsewhere",
        "log_every=1",
        "loader.workers=7",
        "checkpoint.every=5",
        "run_dir=somewhere",
        "resume=true",
        "iterations=5",
        "bn.recompute=true",
        "warmup.epochs=5",  # what null means at 90 epochs
        "schedule.milestones=[30,60,80]",
        "cuda_graphs=true",
        "bn.kernel=separate",
        "exchange.bucket_mb=50",
        "exchange.static_graph=true",
    ],
)
def test_what_does_not_change_the_experiment(compose, override):
    assert compose(override).experiment_hash("fp32") == compose().experiment_hash("fp32")
    assert compose(override).run_hash("fp32") == compose().run_hash("fp32")


@pytest.mark.parametrize(
    "override",
    [
        "k=4",
        "n=16",
        "epochs=89",
        "lr.base=0.2",
        "lr.base_minibatch=128",
        "lr.scaling=sqrt",
        "bn.running=mean",
        "bn.momentum=0.2",
        "model=resnet20",
        "model.zero_gamma=false",
        "model.init=own",
        "dataset=synthetic",
        "dataset.pad=2",
        "dataset.decoder=pillow",
        "warmup=constant",
        "warmup.epochs=4",
        "schedule=cosine",
        "schedule.milestones=[10]",
        "schedule.factor=0.2",
        "optimizer=lars",
        "optimizer.momentum=0.8",
        "optimizer.nesterov=false",
        "optimizer.weight_decay=0",
        "exchange.compress=bf16",
    ],
)
def test_what_changes_the_experiment(compose, override):
    assert compose(override).experiment_hash("fp32") != compose().experiment_hash("fp32")


def test_the_seed_makes_another_run_of_the_same_experiment(compose):
    one, two = compose("seed=0"), compose("seed=1")
    assert one.experiment_hash("fp32") == two.experiment_hash("fp32")
    assert one.run_hash("fp32") != two.run_hash("fp32")


def test_the_resolved_precision_is_part_of_the_experiment(compose):
    hashes = {compose().experiment_hash(precision) for precision in ("fp32", "tf32", "bf16", "fp64")}
    assert len(hashes) == 4
    asked = compose("precision=fp32")
    assert asked.experiment_hash("fp32") == compose().experiment_hash("fp32")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bn.kernel=fussed", "bn.kernel=fussed is not known: .* Did you mean 'fused'?"),
        ("exchange.bucket_mb=0", "exchange.bucket_mb=0 is out of range: it takes MiB above 0."),
        ("exchange.compress=fp16", "exchange.compress=fp16 is not known: it takes none, bf16."),
    ],
)
def test_ways_to_compute_that_do_not_exist_are_refused(compose, override, message):
    with pytest.raises(UserError, match=message):
        compose(override)


def test_unknown_and_missing_keys_are_refused(compose):
    values = compose().to_mapping()
    with pytest.raises(UserError, match=r"'epocs' is not a key .* Did you mean 'epochs'\?"):
        Config.from_mapping({**values, "epocs": 3})
    with pytest.raises(UserError, match=r"'lr\.bas' is not a key .* Did you mean 'base'\?"):
        Config.from_mapping({**values, "lr": {**values["lr"], "bas": 3}})
    del values["seed"]
    with pytest.raises(UserError, match="'seed' is missing"):
        Config.from_mapping(values)


@pytest.mark.parametrize(
    ("number", "expected"), [(1, [1]), (12, [1, 2, 3, 4, 6, 12]), (36, [1, 2, 3, 4, 6, 9, 12, 18, 36])]
)
def test_divisors(number, expected):
    assert divisors(number) == expected


def test_by_default_a_cpu_runs_one_process_worker_by_worker(compose):
    placement = place(compose(), CPU)
    assert (placement.device, placement.precision, placement.channels_last) == ("cpu", "fp32", False)
    assert (placement.processes, placement.workers, placement.workers_per_pass, placement.threads) == (1, 8, 1, 8)


@pytest.mark.parametrize(
    ("k", "processes", "workers_per_pass"), [(8, 8, 1), (256, 8, 8), (12, 6, 2), (7, 7, 1), (36, 6, 6), (11, 1, 1)]
)
def test_by_default_gpus_share_the_workers_evenly(compose, k, processes, workers_per_pass):
    placement = place(compose(f"k={k}", "n=1"), GPUS)
    assert (placement.processes, placement.workers_per_pass) == (processes, workers_per_pass)
    assert placement.processes * placement.workers == k
    assert (placement.device, placement.precision, placement.channels_last) == ("cuda", "bf16", True)


@pytest.mark.parametrize(
    ("n", "workers_per_pass"), [(1, 8), (32, 8), (64, 8), (65, 4), (128, 4), (256, 2), (300, 1), (512, 1), (2048, 1)]
)
def test_by_default_a_pass_on_a_gpu_holds_at_most_512_samples(compose, n, workers_per_pass):
    words = ["k=8", f"n={n}", "dataset=synthetic"]
    assert place(compose(*words), replace(GPUS, gpus=1)).workers_per_pass == workers_per_pass
    assert place(compose(*words, "workers_per_pass=8"), replace(GPUS, gpus=1)).workers_per_pass == 8


def test_cores_are_shared_out_unless_threads_are_given(compose):
    assert place(compose("processes=4"), CPU).threads == 2
    assert place(compose("processes=4", "threads=7"), CPU).threads == 7
    assert place(compose("processes=8"), replace(CPU, cores=2)).threads == 1


def test_tf32_is_a_precision_of_gpus_alone(compose):
    assert place(compose("precision=fp32", "tf32=true"), GPUS).precision == "tf32"
    assert place(compose("precision=fp32"), GPUS).precision == "fp32"
    assert place(compose("tf32=true"), CPU).precision == "fp32"


def test_an_older_gpu_does_not_fall_into_emulated_bf16(compose):
    assert place(compose(), replace(GPUS, bf16=False)).precision == "fp32"


def test_apples_gpu_serves_one_process_and_no_fp64(compose):
    mac = Hardware(cores=8, gpus=0, mps=True, bf16=False)
    assert place(compose(), mac).device == "mps"
    assert place(compose("processes=2"), mac).device == "cpu"
    assert place(compose("precision=fp64"), mac).device == "cpu"


def test_a_group_of_ranks_is_joined_as_it_is(compose):
    placement = place(compose(), CPU, world_size=4)
    assert (placement.processes, placement.workers) == (4, 2)


@pytest.mark.parametrize(
    ("overrides", "hardware", "world_size", "words"),
    [
        (["device=cuda"], CPU, None, "device=cuda was given, but this machine has no usable CUDA GPU: use device=cpu"),
        (["device=mps"], CPU, None, "no Apple GPU: use device=cpu"),
        (["precision=bf16"], CPU, None, "precision=bf16 was given, but device=cpu has no bf16 .*fp32"),
        (["precision=bf16"], replace(GPUS, bf16=False), None, "device=cuda has no bf16 arithmetic"),
        (["k=16", "processes=16"], GPUS, None, "processes=16 is more than the 8 GPUs here"),
        (["workers_per_pass=3"], CPU, None, r"does not divide the 8 workers .* These do: 1, 2, 4, 8\."),
        (["workers_per_pass=8", "processes=2"], CPU, None, r"does not divide the 4 workers .* These do: 1, 2, 4\."),
        ([], CPU, 3, r"3 processes were started .* does not divide k=8\. These do: 1, 2, 4, 8\."),
        (["processes=2"], CPU, 4, "started as one of 4 .*: leave processes out"),
        (["device=mps", "processes=2"], replace(CPU, mps=True), None, "device=mps runs one process"),
        (["device=mps", "precision=fp64"], replace(CPU, mps=True), None, "fp64 does not exist on Apple's GPU"),
    ],
)
def test_a_place_that_cannot_be_had_is_refused(compose, overrides, hardware, world_size, words):
    with pytest.raises(UserError, match=words):
        place(compose(*overrides), hardware, world_size)
