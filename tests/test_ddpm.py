"""Schedules and samplers against diffusers, closed forms and an exact denoiser."""

import itertools
import math
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import ddpm
import unet
from ddpm import Schedule
from tests.conftest import denoise

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy's word on diffusers

PEERS = {
    "DDPM": "ddpm",
    "DDIM": "ddim",
    "DPMSolverMultistep": "dpmsolver_multistep",
    "UniPCMultistep": "unipc_multistep",
}
SHAPE = (3, 4, 5)
f64 = torch.float64


# ---- helpers -----------------------------------------------------------------------------------------------


class Float64Torch:
    """torch, with float64 in place of float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextmanager
def float64_diffusers(kind, on=True):
    """Inside, diffusers' scheduler computes its tables and steps in float64, by its own code."""
    module = import_module(f"diffusers.schedulers.scheduling_{PEERS[kind]}")
    if not on:
        yield module
        return
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(module, "torch", Float64Torch()):
            yield module
    finally:
        torch.set_default_dtype(torch.float32)


def peer(module, kind, schedule, steps=None, **options):
    """diffusers' scheduler for our schedule, by way of the configuration that we write."""
    cls = getattr(module, f"{kind}Scheduler")
    config = {k: v for k, v in schedule.to_dict().items() if kind in ("DDPM", "DDIM") or not k.startswith("clip")}
    config.pop("variance_type") if kind != "DDPM" else None
    scheduler = cls.from_config({**config, **options})
    if steps is not None:
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "sigmas"):  # made in float32 by way of numpy: the same numbers in the table's precision
            alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps]
            scheduler.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1)])
    return scheduler


def randn(*shape, seed=0, dtype=f64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_table(sampler, schedule, times, *options):
    return ddpm.table_of(schedule, times, sampler(schedule, times, *options))


def run(table, x, outputs, noises=None):
    """All steps of a table, given the network or its outputs -> the list of states after each step."""
    state, states = ddpm.initial_state(x), []
    for i, row in enumerate(table):
        output = outputs(state[:, 0], row[0]) if callable(outputs) else outputs[i]
        state, _ = ddpm.step(state, output, row.expand(len(x), -1), noises[i] if noises else None)
        states.append(state)
    return states


def error(a, b):
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def matrices(table):
    return table[:, ddpm.MATRIX :].unflatten(1, (ddpm.STATE, ddpm.TERMS))


def schedule_of(log_noise) -> Schedule:
    """The schedule with these values of log(sigma/alpha), increasing in t."""
    alpha_bar = torch.sigmoid(-2 * log_noise)
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=f64), alpha_bar[:-1]])
    return Schedule(num_train_timesteps=len(betas), trained_betas=tuple(betas.tolist()), clip_sample=False)


# ---- noise schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [7, 1000])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta", ddpm.BETA_SCHEDULES)
def test_alpha_bar_is_that_of_diffusers(beta, zero_snr, total):
    schedule = Schedule(total, beta_schedule=beta, prediction_type="sample", rescale_betas_zero_snr=zero_snr)
    with float64_diffusers("DDPM") as module:
        in_float64 = peer(module, "DDPM", schedule).alphas_cumprod
    assert (schedule.alpha_bar - in_float64).abs().max() < 1e-13
    stock = DDPMScheduler.from_config(schedule.to_dict()).alphas_cumprod.double()
    assert schedule.alpha_bar.dtype == f64
    # Rescaling subtracts, which magnifies the rounding of float32 tables.
    assert (schedule.alpha_bar / stock - 1).abs()[: total - 1].max() < (5e-5 if zero_snr else 1e-6)
    assert (schedule.alpha_bar[-1] - stock[-1]).abs() < 1e-6


def test_alpha_bar_in_closed_form():
    T = 1000
    betas = [1e-4 + i / (T - 1) * (0.02 - 1e-4) for i in range(T)]
    sums = torch.tensor([math.fsum(math.log1p(-b) for b in betas[: i + 1]) for i in range(T)], dtype=f64)
    assert (Schedule().alpha_bar.log() - sums).abs().max() < 1e-12
    roots = [0.01 + i / (T - 1) * (0.02**0.5 - 0.01) for i in range(T)]
    expected = math.exp(math.fsum(math.log1p(-(r**2)) for r in roots))
    assert float(Schedule(beta_schedule="scaled_linear").alpha_bar[-1]) == pytest.approx(expected, rel=1e-12)
    betas = [1e-4 + (0.02 - 1e-4) / (1 + math.exp(-(-6 + 12 * i / (T - 1)))) for i in range(T)]
    expected = math.exp(math.fsum(math.log1p(-b) for b in betas))
    assert float(Schedule(beta_schedule="sigmoid").alpha_bar[-1]) == pytest.approx(expected, rel=1e-12)
    given = Schedule(2, trained_betas=(0.1, 0.3))
    assert given.alpha_bar.tolist() == pytest.approx([0.9, 0.63], rel=1e-15)


def test_cosine_alpha_bar_is_f_wherever_beta_is_not_capped():
    schedule = Schedule(beta_schedule="squaredcos_cap_v2")
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    expected = torch.tensor(f[1:], dtype=f64) / f[0]
    assert (schedule.alpha_bar / expected - 1)[:-1].abs().max() < 1e-10
    assert float(schedule.alpha_bar[-1] / schedule.alpha_bar[-2]) == pytest.approx(0.001)  # the cap


@pytest.mark.parametrize("beta", ddpm.BETA_SCHEDULES)
def test_zero_terminal_snr(beta):
    plain = Schedule(beta_schedule=beta, prediction_type="v_prediction")
    schedule = replace(plain, rescale_betas_zero_snr=True)
    assert float(schedule.alpha_bar[-1]) == 0
    assert float(schedule.alpha_bar[0]) == pytest.approx(float(plain.alpha_bar[0]), rel=1e-14)
    assert (schedule.alpha_bar.diff() < 0).all()
    with pytest.raises(ValueError, match="epsilon"):
        replace(schedule, prediction_type="epsilon")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_train_timesteps": 3, "trained_betas": (0.1, 0.2, 0.3)},
        {"beta_schedule": "sigmoid", "variance_type": "fixed_large", "timestep_spacing": "trailing"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False},
        {"prediction_type": "sample", "clip_sample_range": 2.5, "steps_offset": 1},
    ],
)
def test_config_travels_both_ways(changes):
    schedule = Schedule(**changes)
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    theirs = DDPMScheduler.from_config(schedule.to_dict())
    assert Schedule.from_dict(dict(theirs.config)) == schedule  # as diffusers saves it, defaults and private keys too
    assert Schedule.from_dict({"_class_name": "DDPMScheduler", **schedule.to_dict()}) == schedule


def test_defaults_are_those_of_diffusers():
    """Old files leave keys out and rely on them."""
    assert Schedule.from_dict(dict(DDPMScheduler().config)) == Schedule()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"thresholding": True}, "thresholding"),
        ({"variance_type": "learned_range"}, "learned_range"),
        ({"variance_type": "fixed_small_log"}, "fixed_small_log"),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"beta_schedule": "exp"}, "exp"),
        ({"prediction_type": "flow"}, "flow"),
        ({"timestep_spacing": "karras"}, "karras"),
        ({"surprise": 1, "another": 2}, "another, surprise"),
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps"),
        ({"num_train_timesteps": True}, "num_train_timesteps"),
        ({"beta_start": "small"}, "type"),
        ({"beta_start": -1e-4}, "beta"),
        ({"beta_end": 1.0}, "beta"),
        ({"beta_end": math.nan}, "beta"),
        (
            {"beta_start": 1e-18},
            "beta",
        ),  # 1 - beta is 1: a first timestep without noise, and a division by zero
        ({"beta_start": 0.999, "beta_end": 0.999}, "beta"),  # alpha_bar is 0 long before the end
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"trained_betas": []}, "trained_betas"),
        ({"trained_betas": [0.0, 0.1], "num_train_timesteps": 2}, "beta"),
        ({"trained_betas": 5}, "type|trained_betas"),
        ({"trained_betas": "ab", "num_train_timesteps": 2}, "type|trained_betas"),
        ({"clip_sample_range": 0}, "clip_sample_range"),
        ({"clip_sample_range": math.nan}, "clip_sample_range"),
        ({"clip_sample_range": "1"}, "type|clip_sample_range"),
        ({"clip_sample": "no"}, "clip_sample"),
        ({"steps_offset": -1}, "steps_offset"),  # would wrap round to the noisiest timestep
        ({"steps_offset": 0.5}, "steps_offset"),
        ({"steps_offset": "1"}, "steps_offset"),
        ({"rescale_betas_zero_snr": True}, "epsilon"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_not_implemented_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named) as caught:
        Schedule.from_dict(change)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_keys_that_mean_nothing_without_thresholding_are_let_through():
    config = {"thresholding": False, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    assert Schedule.from_dict(config) == Schedule()


# ---- training ----------------------------------------------------------------------------------------------


def test_alpha_bar_of_an_unknown_schedule_is_refused(monkeypatch):
    """A name that is listed but not written out must not get another schedule's numbers."""
    monkeypatch.setattr(ddpm, "BETA_SCHEDULES", (*ddpm.BETA_SCHEDULES, "laplace"))
    with pytest.raises(ValueError, match="'laplace' is not implemented"):
        Schedule(beta_schedule="laplace")


@pytest.mark.parametrize("prediction", ddpm.PREDICTIONS)
def test_noisy_images_and_targets_are_those_of_diffusers(prediction):
    schedule = Schedule(prediction_type=prediction)
    x0, eps, t = randn(6, *SHAPE), randn(6, *SHAPE, seed=1), torch.tensor([0, 1, 500, 998, 999, 3])
    with float64_diffusers("DDPM") as module:
        scheduler = peer(module, "DDPM", schedule)
        noisy = scheduler.add_noise(x0, eps, t)
        expected = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, t)}[prediction]
    found, target = ddpm.noisy_and_target(ddpm.training_table(schedule), x0, eps, t)
    assert (found - noisy).abs().max() < 1e-13 and (target - expected).abs().max() < 1e-13
    in_float32 = ddpm.noisy_and_target(ddpm.training_table(schedule), x0.float(), eps.float(), t)
    assert in_float32[0].dtype == torch.float32 and (in_float32[0] - noisy).abs().max() < 1e-6


@pytest.mark.parametrize("zero_snr", [False, True])
def test_predictions_of_one_truth_give_one_x0(zero_snr):
    """The target of training, put into a sampler's row, is x0 again, at every timestep."""
    T = 1000
    x0, eps = randn(T, 1, 1, 2), randn(T, 1, 1, 2, seed=1)
    for prediction in ddpm.PREDICTIONS[zero_snr:]:
        schedule = Schedule(prediction_type=prediction, clip_sample=False, rescale_betas_zero_snr=zero_snr)
        t = torch.arange(T - 1, -1, -1)
        x, target = ddpm.noisy_and_target(ddpm.training_table(schedule), x0, eps, t)
        table = make_table(ddpm.ddim, schedule, t.tolist())
        _, found = ddpm.step(ddpm.initial_state(x), target, table)
        assert (found - x0).abs().max() < 1e-12, prediction


def test_min_snr_weighs_the_error_of_x0_alike_for_all_predictions():
    """min(snr, gamma), over snr for epsilon, over 1 for x0, over snr + 1 for v."""
    T, gamma = 1000, 3.0
    x0, eps, wrong = (randn(T, 1, 1, 2, seed=i) for i in range(3))
    t, results = torch.arange(T), []
    for prediction in ddpm.PREDICTIONS:
        schedule = Schedule(prediction_type=prediction)
        a = schedule.alpha_bar
        snr = a / (1 - a)
        capped = torch.minimum(snr, torch.full_like(snr, gamma))
        by_hand = {"epsilon": capped / snr, "sample": capped, "v_prediction": capped / (snr + 1)}[prediction]
        table = ddpm.training_table(schedule, "min_snr", gamma)
        assert (table[:, 4] / by_hand - 1).abs().max() < 1e-12
        assert torch.equal(ddpm.training_table(schedule)[:, 4], torch.ones(T, dtype=f64))
        assert torch.equal(ddpm.training_table(schedule)[:, :4], table[:, :4])
        alpha, sigma = (v[:, None, None, None] for v in (a.sqrt(), (1 - a).sqrt()))
        x, target = ddpm.noisy_and_target(table, x0, eps, t)
        output = {
            "epsilon": (x - alpha * wrong) / sigma,
            "sample": wrong,
            "v_prediction": alpha * (x - alpha * wrong) / sigma - sigma * wrong,
        }[prediction]
        results.append(table[:, 4] * (output - target).square().mean(dim=(1, 2, 3)))
    assert error(results[0], results[1]) < 1e-9 and error(results[2], results[1]) < 1e-9
    default = ddpm.training_table(Schedule(prediction_type="sample"), "min_snr")
    assert float(default[:, 4].max()) == 5.0  # gamma of the paper


def test_losses_are_of_each_image_and_in_float32():
    table = ddpm.training_table(Schedule(prediction_type="v_prediction"), "min_snr")
    output, target, t = randn(4, *SHAPE).bfloat16(), randn(4, *SHAPE, seed=1), torch.tensor([0, 10, 500, 999])
    found = ddpm.losses(table, output, target, t)
    assert found.shape == (4,) and found.dtype == torch.float32
    for i in range(4):
        squares = [
            (a - b) ** 2 for a, b in zip(output[i].flatten().tolist(), target[i].flatten().tolist(), strict=True)
        ]
        expected = float(table[t[i], 4]) * math.fsum(squares) / len(squares)
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="huber"):
        ddpm.training_table(Schedule(), "huber")


def test_uniform_timesteps_are_exact():
    cdf = ddpm.timestep_cdf(Schedule(8))
    assert cdf.tolist() == [i / 8 for i in range(1, 9)]
    u = torch.arange(64, dtype=f64) / 64
    assert torch.equal(ddpm.choose_timesteps(cdf, u), torch.arange(64) // 8)
    ends = torch.tensor([0.0, 1 - 2**-24, 0.125])
    assert ddpm.choose_timesteps(cdf, ends).tolist() == [0, 7, 1]
    cdf = ddpm.timestep_cdf(Schedule(1000))
    assert ddpm.choose_timesteps(cdf, torch.tensor([0.0, 1 - 2**-53], dtype=f64)).tolist() == [0, 999]
    with pytest.raises(ValueError, match="cubic"):
        ddpm.timestep_cdf(Schedule(), "cubic")


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 0.7)])
def test_lognormal_timesteps_have_the_noise_levels_asked_for(mean, std):
    """On a fine schedule whose levels are unevenly spaced, so that the width of each counts."""
    log_noise = -10 + 18 * torch.linspace(0, 1, 4000, dtype=f64) ** 1.5
    cdf = ddpm.timestep_cdf(schedule_of(log_noise), "lognormal", mean, std)
    p = cdf.diff(prepend=torch.zeros(1, dtype=f64))
    assert (p >= 0).all() and float(cdf[-1]) == pytest.approx(1, abs=1e-12)
    found = float((p * log_noise).sum())
    assert found == pytest.approx(mean, abs=1e-4)
    assert float((p * (log_noise - found) ** 2).sum().sqrt()) == pytest.approx(std, abs=1e-4)
    below = float(p[log_noise < mean - std].sum())
    assert below == pytest.approx(0.5 * math.erfc(1 / math.sqrt(2)), abs=5e-3)
    drawn = ddpm.choose_timesteps(cdf, torch.rand(50_000, generator=torch.Generator().manual_seed(0)))
    assert float(log_noise[drawn].mean()) == pytest.approx(mean, abs=0.02)
    ends = ddpm.choose_timesteps(cdf, torch.tensor([0.0, 1 - 2**-53], dtype=f64))
    assert ends[0] < ends[1] < 4000


@pytest.mark.parametrize("total", [2, 3, 1000])
def test_lognormal_timesteps_with_zero_terminal_snr_are_finite(total):
    schedule = Schedule(total, prediction_type="sample", rescale_betas_zero_snr=True)
    cdf = ddpm.timestep_cdf(schedule, "lognormal")
    assert cdf.isfinite().all() and (cdf.diff() >= 0).all() and float(cdf[-1]) == pytest.approx(1, abs=1e-12)


# ---- timesteps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("total", [2, 10, 97, 1000])
def test_spacings_are_those_of_diffusers(spacing, total):
    schedule = Schedule(total, timestep_spacing=spacing)
    scheduler = DDPMScheduler.from_config(schedule.to_dict())
    for steps in range(1, total + 1):
        scheduler.set_timesteps(steps)
        found, expected = ddpm.timesteps(schedule, steps, spacing), scheduler.timesteps.tolist()
        if len(expected) == steps + 1:  # rounding in numpy.arange: one too many, which is no timestep
            assert spacing == "trailing" and expected.pop() == -1
        assert found == expected, steps
        assert all(type(time) is int for time in found)


def test_steps_offset_is_that_of_diffusers():
    schedule = Schedule(100, steps_offset=3)
    scheduler = DDPMScheduler.from_config(schedule.to_dict())
    scheduler.set_timesteps(7)
    assert ddpm.timesteps(schedule, 7, "leading") == scheduler.timesteps.tolist()
    with pytest.raises(ValueError, match="steps_offset"):
        ddpm.timesteps(schedule, 100, "leading")


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta", ddpm.BETA_SCHEDULES)
def test_logsnr_timesteps_descend_from_the_last(beta, zero_snr):
    for total in (2, 10, 250):
        schedule = Schedule(total, beta_schedule=beta, prediction_type="sample", rescale_betas_zero_snr=zero_snr)
        for steps in {*range(1, min(total, 30) + 1), total // 2, total - 1, total}:
            found = ddpm.timesteps(schedule, steps, "logsnr")
            assert len(found) == steps and found[0] == total - 1 and found[-1] >= 0
            assert all(a > b for a, b in itertools.pairwise(found))
            assert found[-1] == 0 or steps == 1
    schedule = Schedule()
    lam = (schedule.alpha / schedule.sigma).log()[ddpm.timesteps(schedule, 10, "logsnr")]
    assert (lam.diff() / lam.diff().mean() - 1).abs().max() < 0.1  # evenly spaced, but for rounding to timesteps


def test_steps_outside_1_to_T_are_refused():
    for steps in (0, -1, 11):
        for spacing in ddpm.SPACINGS:
            with pytest.raises(ValueError, match=rf"1 to 10.*not {steps}"):
                ddpm.timesteps(Schedule(10), steps, spacing)
    with pytest.raises(ValueError, match="karras"):
        ddpm.timesteps(Schedule(10), 5, "karras")


# ---- each sampler step against diffusers -------------------------------------------------------------------

# Relative to the largest value, after every step. "stock" is diffusers untouched, with its float32 tables.
EXACT, STOCK = 1e-10, 2e-5


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "stock"])
@pytest.mark.parametrize("prediction", ddpm.PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("variance", ddpm.VARIANCES)
def test_ddpm_steps_are_those_of_diffusers(variance, spacing, prediction, exact):
    """But for the noise that diffusers adds at a last step whose timestep is not 0: none is handed to it."""
    schedule = Schedule(1000, variance_type=variance, timestep_spacing=spacing, prediction_type=prediction)
    for steps in (1, 2, 13):
        x = randn(2, *SHAPE)
        outputs = [randn(2, *SHAPE, seed=10 + i) for i in range(steps)]
        noises = [randn(2, *SHAPE, seed=100 + i) * (i < steps - 1) for i in range(steps)]
        table = ddpm.sampler_table(schedule, "ddpm", steps)
        assert (matrices(table)[:-1, 0, ddpm.NOISE] > 0).all() and matrices(table)[-1, 0, ddpm.NOISE] == 0
        states = run(table, x, outputs, noises)
        with float64_diffusers("DDPM", exact) as module:
            scheduler = peer(module, "DDPM", schedule, steps)
            for i, t in enumerate(scheduler.timesteps):
                with patch.object(module, "randn_tensor", lambda *args, n=noises[i], **kw: n):
                    x = scheduler.step(outputs[i], t, x).prev_sample
                assert error(states[i][:, 0], x) < (EXACT if exact else STOCK), (steps, i)


def test_ddpm_ends_without_noise_where_diffusers_adds_some():
    """fixed_large with trailing timesteps leaves its noise in the images there: kept out on purpose."""
    schedule = Schedule(1000, variance_type="fixed_large", timestep_spacing="trailing")
    x, output, noise = randn(1, *SHAPE), randn(1, *SHAPE, seed=1), randn(1, *SHAPE, seed=2)
    with float64_diffusers("DDPM") as module:
        scheduler = peer(module, "DDPM", schedule, 10)
        with patch.object(module, "randn_tensor", lambda *args, **kw: noise):
            theirs = scheduler.step(output, scheduler.timesteps[-1], x)
    row = ddpm.sampler_table(schedule, "ddpm", 10)[-1:]
    ours, x0 = ddpm.step(ddpm.initial_state(x), output, row, noise)
    assert int(row[0, 0]) == 99 and error(ours[:, 0], theirs.pred_original_sample) < EXACT
    assert torch.equal(ours[:, 0], x0)
    expected = (1 - schedule.alpha_bar[99]).sqrt() * noise
    assert error(theirs.prev_sample - ours[:, 0], expected) < 1e-9


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "stock"])
@pytest.mark.parametrize("prediction", ddpm.PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_steps_are_those_of_diffusers(eta, prediction, clip, exact):
    """With steps that divide T, where its previous timestep t - T//N is the next listed one, and with epsilon
    derived anew from a clipped x0, as ours always is."""
    schedule = Schedule(1000, prediction_type=prediction, clip_sample=clip)
    for steps in (1, 2, 10):
        x = randn(2, *SHAPE)
        outputs = [randn(2, *SHAPE, seed=10 + i) for i in range(steps)]
        noises = [randn(2, *SHAPE, seed=100 + i) for i in range(steps)]
        table = ddpm.sampler_table(schedule, "ddim", steps, "leading", eta)
        states = run(table, x, outputs, noises)
        with float64_diffusers("DDIM", exact) as module:
            scheduler = peer(module, "DDIM", schedule, steps)
            for i, t in enumerate(scheduler.timesteps):
                kw = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noises[i]}
                x = scheduler.step(outputs[i], t, x, **kw).prev_sample
                assert error(states[i][:, 0], x) < (EXACT if exact else STOCK), (steps, i)


def test_ddim_goes_to_the_next_listed_timestep_and_epsilon_follows_the_clipped_x0():
    """By hand. Diffusers does otherwise: with linspace it goes to t - T//N, and it keeps the old epsilon."""
    schedule = Schedule(1000)
    times = ddpm.timesteps(schedule, 7, "linspace")
    x, output = randn(1, *SHAPE), randn(1, *SHAPE, seed=1)
    row = make_table(ddpm.ddim, schedule, times)[2:3]
    ours = ddpm.step(ddpm.initial_state(x), output, row)[0][:, 0]
    a, b = (float(schedule.alpha_bar[t]) for t in times[2:4])
    x0 = ((x - math.sqrt(1 - a) * output) / math.sqrt(a)).clamp(-1, 1)
    eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
    assert error(ours, math.sqrt(b) * x0 + math.sqrt(1 - b) * eps) < 1e-12
    with float64_diffusers("DDIM") as module:
        scheduler = peer(module, "DDIM", schedule, 7)
        stock, clipped = (
            scheduler.step(output, times[2], x, use_clipped_model_output=flag).prev_sample for flag in (False, True)
        )
    assert error(ours, stock) > 0.01 and error(ours, clipped) > 0.01 and error(stock, clipped) > 0.01


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "stock"])
@pytest.mark.parametrize("prediction", ddpm.PREDICTIONS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", ["DPMSolverMultistep", "UniPCMultistep"])
def test_multistep_solvers_are_those_of_diffusers(kind, spacing, prediction, exact):
    """At diffusers' timesteps, where nothing is clipped, and 1, 2, 3 or over 15 steps take other branches."""
    schedule = Schedule(1000, prediction_type=prediction, clip_sample=False, timestep_spacing=spacing)
    sampler = {"DPMSolverMultistep": ddpm.dpm_solver_pp, "UniPCMultistep": ddpm.unipc}[kind]
    for steps in (1, 2, 3, 5, 20):
        x = randn(2, *SHAPE)
        outputs = [randn(2, *SHAPE, seed=10 + i) for i in range(steps)]
        with float64_diffusers(kind, exact) as module:
            scheduler = peer(module, kind, schedule, steps)
            states = run(make_table(sampler, schedule, scheduler.timesteps.tolist()), x, outputs)
            for i, t in enumerate(scheduler.timesteps):
                x = scheduler.step(outputs[i], t, x).prev_sample
                assert error(states[i][:, 0], x) < (EXACT if exact else STOCK), (steps, i)


def test_ipndm_is_adams_bashforth():
    """Written out in x/alpha and sigma/alpha, for a network that predicts eps and where nothing is clipped."""
    schedule = Schedule(1000, clip_sample=False)
    times = ddpm.timesteps(schedule, 9, "trailing")
    x, outputs = randn(2, *SHAPE), [randn(2, *SHAPE, seed=10 + i) for i in range(9)]
    states = run(make_table(ddpm.ipndm, schedule, times), x, outputs)
    ratio = [float(schedule.sigma[t] / schedule.alpha[t]) for t in times] + [0.0]
    alphas = [float(schedule.alpha[t]) for t in times] + [1.0]
    y = x / alphas[0]
    for i in range(9):
        h, d = ratio[i + 1] - ratio[i], outputs[i::-1]
        if i in (0, 8):
            slope = d[0]
        elif i == 1:
            slope = (3 * d[0] - d[1]) / 2
        elif i == 2:
            slope = (23 * d[0] - 16 * d[1] + 5 * d[2]) / 12
        else:
            slope = (55 * d[0] - 59 * d[1] + 37 * d[2] - 9 * d[3]) / 24
        y = y + h * slope
        assert error(states[i][:, 0], y * alphas[i + 1]) < EXACT, i


# ---- closed forms and oracles ------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [[2, 1, 0], [2, 0], [1, 0]])
def test_ancestral_row_is_the_posterior_of_gaussians(times):
    """q(x_s | x_t, x0) is the product of two Gaussians in x_s: what x0 says of it, and what x_t says."""
    betas = (0.1, 0.3, 0.6)
    alpha_bar = [0.9, 0.9 * 0.7, 0.9 * 0.7 * 0.4]
    small, large = (
        make_table(ddpm.ddpm, Schedule(3, trained_betas=betas, variance_type=variance), times)
        for variance in ddpm.VARIANCES
    )
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        forward = alpha_bar[t] / alpha_bar[s]  # x_t = sqrt(forward) x_s + sqrt(1 - forward) noise
        from_x0, from_xt = 1 / (1 - alpha_bar[s]), forward / (1 - forward)  # precisions
        variance = 1 / (from_x0 + from_xt)
        on_x0 = variance * from_x0 * math.sqrt(alpha_bar[s])
        on_xt = variance * from_xt / math.sqrt(forward)
        matrix = matrices(small)[i, 0]
        assert float(matrix[ddpm.X]) == pytest.approx(on_xt, rel=1e-12)
        assert float(matrix[ddpm.X0]) == pytest.approx(on_x0, rel=1e-12)
        assert float(matrix[ddpm.NOISE]) ** 2 == pytest.approx(variance, rel=1e-12)
        assert float(matrices(large)[i, 0, ddpm.NOISE]) ** 2 == pytest.approx(1 - forward, rel=1e-12)
        assert matrix[1:4].tolist() == [0, 0, 0]
    for table in (small, large):
        assert matrices(table)[-1, 0].tolist() == pytest.approx([0, 0, 0, 0, 1, 0], abs=1e-15)


def test_ddim_with_eta_1_is_ancestral_sampling():
    schedule = Schedule(1000)
    times = ddpm.timesteps(schedule, ddpm.DEFAULT_STEPS, "trailing")
    assert (
        make_table(ddpm.ddim, schedule, times, 1.0) - make_table(ddpm.ddpm, schedule, times)
    ).nan_to_num().abs().max() < 1e-12


DATA = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=f64) * 2 - 1


def oracle(schedule, data=DATA):
    """The exact denoiser of a finite data set, the posterior mean, as a network with this prediction."""

    def network(x, t, labels=None):
        alpha, sigma = (v[t][:, None, None, None] for v in (schedule.alpha, schedule.sigma))
        x = x.double()
        distance = (x[:, None] - alpha[:, None] * data[None]).square().sum(dim=(2, 3, 4))
        weights = torch.softmax(-distance / (2 * sigma[:, :, 0, 0] ** 2), dim=1)
        x0 = torch.einsum("bn,nchw->bchw", weights, data)
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[schedule.prediction_type]

    return network


def generators(n, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


def noise_from(generators, shape, patch_size=1):
    return lambda: ddpm.normal(generators, shape, patch_size)


@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [*itertools.product(ddpm.PREDICTIONS, [False]), ("sample", True), ("v_prediction", True)],
)
@pytest.mark.parametrize("clip", [True, False], ids=["clip", ""])
@pytest.mark.parametrize("sampler", [*ddpm.SAMPLERS, "ddim eta 0.5"])
def test_every_sampler_lands_on_a_training_image(sampler, prediction, clip, zero_snr):
    schedule = Schedule(
        prediction_type=prediction,
        clip_sample=clip,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
    )
    name, eta = ("ddim", 0.5) if " " in sampler else (sampler, 0.0)
    table = ddpm.sampler_table(schedule, name, 100 if name == "ddpm" else None, eta=eta)
    assert table[:, : ddpm.CLIP].isfinite().all() and table[:, ddpm.MATRIX :].isfinite().all()
    assert int(table[0, 0]) == 999
    images = denoise(oracle(schedule), table, noise_from(generators(12), DATA.shape[1:]))
    distance = (images[:, None] - DATA[None]).abs().amax(dim=(2, 3, 4))
    assert images.dtype == torch.float32
    # Trailing timesteps end at t = 9, whose noise still leaves the oracle sure of its image.
    assert distance.min(dim=1).values.max() < 1e-4
    assert len(distance.argmin(dim=1).unique()) >= 3  # and not all on the same one


def test_ancestral_sampling_draws_each_training_image_as_often_as_it_occurs():
    """One image three times as likely, by all steps of a short schedule: 25% and 75% within 5 sigma."""
    data = torch.tensor([0.9, -0.9, -0.9, -0.9], dtype=f64).view(4, 1, 1, 1)
    schedule = Schedule(100, beta_end=0.2)
    state = ddpm.initial_state(randn(4000, 1, 1, 1))
    network = oracle(schedule, data)
    for i, row in enumerate(ddpm.sampler_table(schedule, "ddpm")):
        t = torch.full((4000,), int(row[0]))
        rows = row.expand(4000, -1)
        state, _ = ddpm.step(state, network(state[:, 0], t), rows, randn(4000, 1, 1, 1, seed=1 + i))
    share = float((state[:, 0] > 0).double().mean())
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)


# ---- order of convergence ----------------------------------------------------------------------------------

# log(sigma/alpha) of 20,001 timesteps, smooth and uneven; the interior levels are timesteps 4,000 and 16,000.
GRID = torch.linspace(0, 1, 20_001, dtype=f64)
FINE = schedule_of(-5 + 10 * (GRID + 0.08 * torch.sin(2 * math.pi * GRID)))
FINE = replace(FINE, prediction_type="sample")
LOW, HIGH = 4_000, 16_000


def mixture(x, alpha, sigma):
    """E[x0 | x] where each value is drawn from 0.3 N(-0.7, 0.3^2) + 0.7 N(0.5, 0.4^2)."""
    parts = []
    for weight, mean, std in ((0.3, -0.7, 0.3), (0.7, 0.5, 0.4)):
        variance = alpha**2 * std**2 + sigma**2
        density = weight / variance**0.5 * torch.exp(-((x - alpha * mean) ** 2) / (2 * variance))
        parts.append((density, mean + alpha * std**2 / variance * (x - alpha * mean)))
    return sum(d * m for d, m in parts) / sum(d for d, _ in parts)


def exact_solution(x, start, end, steps=2000):
    """The ODE d(x/sigma)/d lambda = e^lambda x0-hat (Lu et al. 2022b, eq. 8), by Runge-Kutta 4."""

    def paths(lam):
        return math.sqrt(1 / (1 + math.exp(-2 * lam))), math.sqrt(1 / (1 + math.exp(2 * lam)))

    def slope(y, lam):
        alpha, sigma = paths(lam)
        return math.exp(lam) * mixture(sigma * y, alpha, sigma)

    y, h = x / paths(start)[1], (end - start) / steps
    for i in range(steps):
        lam = start + i * h
        k1 = slope(y, lam)
        k2 = slope(y + h / 2 * k1, lam + h / 2)
        k3 = slope(y + h / 2 * k2, lam + h / 2)
        k4 = slope(y + h * k3, lam + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y * paths(end)[1]


@pytest.mark.parametrize(
    ("sampler", "least", "most"), [("ddim", 0.9, 1.1), ("dpm++", 1.85, 2.2), ("unipc", 2.7, 3.4), ("ipndm", 1.7, 2.4)]
)
def test_order_of_convergence(sampler, least, most):
    """Error against step size between two interior noise levels. UniPC's corrector raises order 2 to order 3
    (Zhao et al. 2023, theorem 3.1). Of iPNDM, the first step's order 1 and unequal steps leave order 2."""
    x = torch.linspace(-2.5, 2.5, 40, dtype=f64).view(1, 1, 5, 8)
    lam = (FINE.alpha / FINE.sigma).log()
    expected = exact_solution(x, float(lam[HIGH]), float(lam[LOW]))
    errors, counts = [], (40, 80, 160)
    for steps in counts:
        times = list(range(HIGH, LOW - 1, -(HIGH - LOW) // steps))
        assert len(times) == steps + 1 and times[-1] == LOW

        def network(x, t):
            return mixture(x, float(FINE.alpha[int(t)]), float(FINE.sigma[int(t)]))

        table = make_table(ddpm.SAMPLERS[sampler], FINE, times)[:-1]  # all but the step to the clean image
        errors.append(float((run(table, x, network)[-1][:, 0] - expected).abs().max()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    print(sampler, [f"{e:.1e}" for e in errors], [f"{s:.2f}" for s in slopes])
    assert all(least < slope < most for slope in slopes), (errors, slopes)


# ---- slots: images at different steps in one batch ---------------------------------------------------------


def elementwise(x, t, labels=None):
    """A network that looks at each value and timestep alone."""
    return torch.tanh(1.3 * x + t[:, None, None, None] / 300 - 1)


ODD = (3, 5, 7)  # no multiple of a vector's length
JOBS = [
    ("ddpm", 5, "trailing", 0.0),
    ("ddpm", 11, "leading", 0.0),
    ("ddim", 4, "logsnr", 0.0),
    ("ddim", 9, "linspace", 0.8),
    ("dpm++", 1, "logsnr", 0.0),
    ("dpm++", 8, "logsnr", 0.0),
    ("unipc", 3, "logsnr", 0.0),
    ("unipc", 10, "trailing", 0.0),
    ("ipndm", 9, "trailing", 0.0),
]


def solo(table, seed):
    """(state, output, row, noise, next state) of each step of one image on its own."""
    generator, history = generators(1, seed), []
    state = ddpm.initial_state(ddpm.normal(generator, ODD))
    for row in table:
        noise = ddpm.normal(generator, ODD)
        output = elementwise(state[:, 0], row[:1])
        needed = row[ddpm.MATRIX :].view(ddpm.STATE, ddpm.TERMS)[:, ddpm.NOISE].any()
        new, _ = ddpm.step(state, output, row[None], noise if needed else None)
        history.append((state, output, row[None], noise, new))
        state = new
    return history


def test_slots_at_first_middle_and_last_steps_are_their_solo_runs_to_the_bit():
    schedule = Schedule()
    slots = []
    for i, (sampler, steps, spacing, eta) in enumerate(JOBS):
        history = solo(ddpm.sampler_table(schedule, sampler, steps, spacing, eta), i)
        slots += [history[k] for k in sorted({0, steps // 2, steps - 1})]
    assert len(slots) >= 20
    for order in (range(len(slots)), reversed(range(len(slots)))):
        mixed = [slots[i] for i in order]
        new, _ = ddpm.step(*(torch.cat([slot[k] for slot in mixed]) for k in range(4)))
        for slot, found in zip(mixed, new, strict=True):
            assert torch.equal(found, slot[4][0])
    outputs = torch.cat([slot[1] for slot in mixed])
    outputs[::2] = math.nan  # a neighbour that has gone wrong stays alone
    new, _ = ddpm.step(*(torch.cat([slot[k] for slot in mixed]) if k != 1 else outputs for k in range(4)))
    for i, (slot, found) in enumerate(zip(mixed, new, strict=True)):
        assert torch.equal(found, slot[4][0]) == (i % 2 == 1)


def test_images_that_come_and_go_are_their_solo_runs_to_the_bit():
    """A batch that an image joins when it likes and leaves after its last step, as a server has it."""
    schedule = Schedule()
    tables = [ddpm.sampler_table(schedule, *job) for job in JOBS]
    waiting = [(3 * i % 7, i) for i in range(len(JOBS))]  # (tick of arrival, job)
    active, finished, tick = [], {}, 0
    while waiting or active:
        for arrival in [w for w in waiting if w[0] <= tick]:
            waiting.remove(arrival)
            generator = generators(1, arrival[1])
            active.append([arrival[1], 0, generator, ddpm.initial_state(ddpm.normal(generator, ODD))])
        if active:
            rows = torch.stack([tables[job][i] for job, i, _, _ in active])
            state = torch.cat([slot[3] for slot in active])
            noise = torch.cat([ddpm.normal(slot[2], ODD) for slot in active])
            state, _ = ddpm.step(state, elementwise(state[:, 0], rows[:, 0]), rows, noise)
            for slot, new in zip(active, state, strict=True):
                slot[1], slot[3] = slot[1] + 1, new[None]
            finished |= {slot[0]: slot[3] for slot in active if slot[1] == len(tables[slot[0]])}
            active = [slot for slot in active if slot[0] not in finished]
        tick += 1
    for i, table in enumerate(tables):
        assert torch.equal(finished[i], solo(table, i)[-1][4]), JOBS[i]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_an_image_depends_on_its_own_generator_alone(job):
    table = ddpm.sampler_table(Schedule(), *job)
    together = denoise(elementwise, table, noise_from(generators(5), ODD))
    backwards = denoise(elementwise, table, noise_from(generators(5)[::-1], ODD))
    assert torch.equal(backwards.flip(0), together)
    for i in range(5):
        assert torch.equal(denoise(elementwise, table, noise_from(generators(1, i), ODD))[0], together[i])
    assert len({float(image.sum()) for image in together}) == 5


def test_a_deterministic_sampler_takes_nothing_but_x_from_a_generator():
    for sampler in ("ddim", "dpm++", "unipc", "ipndm"):
        generator = generators(1)
        denoise(elementwise, ddpm.sampler_table(Schedule(), sampler, 4), noise_from(generator, ODD))
        fresh = generators(1)
        ddpm.normal(fresh, ODD)
        assert torch.equal(generator[0].get_state(), fresh[0].get_state()), sampler


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_terms_that_are_not_used_may_be_anything(sampler):
    """Never infinity or NaN times zero: a memory that was never written, noise that is not wanted."""
    table = ddpm.sampler_table(Schedule(), sampler, 6)
    x, nan = randn(2, *SHAPE), torch.full((2, *SHAPE), math.nan)
    output = randn(2, *SHAPE, seed=1)
    for i in (0, 3, 5):
        rows = table[i].expand(2, -1)
        used = matrices(rows)[0].any(dim=0)
        state = torch.stack([x, *(randn(2, *SHAPE, seed=k) if used[k] else nan for k in (1, 2, 3))], dim=1)
        noise = randn(2, *SHAPE, seed=9)
        new, x0 = ddpm.step(state, output, rows, noise if used[ddpm.NOISE] else nan)
        assert new.isfinite().all() and x0.isfinite().all()
        if not used[ddpm.NOISE]:
            assert torch.equal(ddpm.step(state, output, rows, None)[0], new)
    assert not matrices(table)[0, ddpm.X, 1:4].any()  # nothing is remembered at the first step


def test_clipping_bounds_the_estimate_of_x0_alone():
    schedule = Schedule(clip_sample_range=0.5)
    table = ddpm.sampler_table(schedule, "ddim", 5)
    x = 3 * randn(2, *SHAPE)
    state, x0 = ddpm.step(ddpm.initial_state(x), 0 * x, table[0].expand(2, -1))
    assert float(x0.abs().max()) == 0.5 and float(state[:, 0].abs().max()) > 0.5
    free = ddpm.sampler_table(replace(schedule, clip_sample=False), "ddim", 5)
    _, x0 = ddpm.step(ddpm.initial_state(x), 0 * x, free[0].expand(2, -1))
    assert error(x0, x / schedule.alpha[999]) < 1e-12


# ---- whole draws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_fifty_steps_are_the_pictures_of_ddpm_pipeline(prediction):
    """The same generators give the same pictures: at most one level of 255 apart, in under 0.5% of values."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    schedule = Schedule(prediction_type=prediction)
    pipeline = DDPMPipeline(network, DDPMScheduler.from_config(schedule.to_dict()))
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=4, generator=generators(4), num_inference_steps=50, output_type="np").images
    expected = (drawn * 255).round().astype("uint8")
    ours = unet.build(unet.UNetConfig.from_dict(dict(network.config)), network.state_dict())
    images = denoise(ours, ddpm.sampler_table(schedule, "ddpm", steps=50), noise_from(generators(4), (3, 16, 16)))
    found = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 20  # pictures, not one colour
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_progress_is_told_of_each_step_and_one_step_is_enough(sampler):
    schedule = Schedule(prediction_type="sample")
    for steps in (1, 4):
        seen = []
        table = ddpm.sampler_table(schedule, sampler, steps)
        images = denoise(
            elementwise,
            table,
            noise_from(generators(2), ODD),
            progress=lambda i, x, x0, seen=seen: seen.append((i, x0.clone())),
        )
        assert [i for i, _ in seen] == list(range(steps)) and all(x0.shape == (2, *ODD) for _, x0 in seen)
        assert images.shape == (2, *ODD) and images.isfinite().all()
        assert (images - seen[-1][1]).abs().max() < 1e-6  # the last step ends on its estimate, where alpha_bar is 1
    x = ddpm.normal(generators(2), ODD)
    once = denoise(elementwise, ddpm.sampler_table(schedule, sampler, 1, "trailing"), noise_from(generators(2), ODD))
    assert (once - elementwise(x, torch.tensor([999, 999]))).abs().max() < 1e-6


def test_labels_and_timesteps_reach_the_network():
    seen = []

    def network(x, t, labels):
        seen.append((t.tolist(), labels.tolist()))
        return x

    table = ddpm.sampler_table(Schedule(), "unipc", 3, "trailing")
    denoise(network, table, noise_from(generators(2), ODD), labels=torch.tensor([4, 7]))
    assert seen == [([t, t], [4, 7]) for t in (999, 666, 332)]


@pytest.mark.parametrize("p", [1, 2])
def test_noise_is_drawn_in_the_layout_of_the_inner_network(p):
    found = ddpm.normal(generators(3), (3, 4, 8), p)
    assert found.shape == (3, 3, 4, 8) and found.dtype == torch.float32
    for i, generator in enumerate(generators(3)):
        inner = torch.randn(1, 3 * p * p, 4 // p, 8 // p, generator=generator)
        assert torch.equal(F.pixel_unshuffle(found[i : i + 1], p), inner)
    table = ddpm.sampler_table(Schedule(), "ddpm", 3)
    images = denoise(elementwise, table, noise_from(generators(2), (3, 4, 8), p))
    inner = denoise(elementwise, table, noise_from(generators(2), (3 * p * p, 4 // p, 8 // p)))
    assert torch.equal(F.pixel_unshuffle(images, p), inner)  # an elementwise network sees no layout


# ---- plan --------------------------------------------------------------------------------------------------


def test_plan_follows_the_schedule_for_ddpm_and_trailing_for_the_others():
    schedule = Schedule(50, timestep_spacing="trailing")
    assert ddpm.sampler_table(schedule, "ddpm", 7)[:, 0].tolist() == ddpm.timesteps(schedule, 7, "trailing")
    assert ddpm.sampler_table(schedule, "ddpm")[:, 0].tolist() == list(range(49, -1, -1))
    plain = Schedule(50, timestep_spacing="leading")
    assert ddpm.sampler_table(plain)[:, 0].tolist() == ddpm.timesteps(plain, ddpm.DEFAULT_STEPS, "trailing")
    assert len(ddpm.sampler_table(Schedule(5))) == 5
    assert ddpm.sampler_table(schedule, "ddim", 7, "linspace")[:, 0].tolist() == ddpm.timesteps(schedule, 7, "linspace")
    times = ddpm.timesteps(schedule, ddpm.DEFAULT_STEPS, "trailing")
    assert torch.equal(ddpm.sampler_table(schedule), make_table(ddpm.SAMPLERS[ddpm.DEFAULT_SAMPLER], schedule, times))
    assert ddpm.sampler_table(schedule).dtype == f64 and ddpm.sampler_table(schedule).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": "euler"}, "euler"),
        ({"sampler": "unipc", "eta": 0.5}, "eta"),
        ({"sampler": "ddim", "eta": 1.5}, "eta"),
        ({"sampler": "ddim", "eta": -0.1}, "eta"),
        ({"sampler": "ddim", "eta": math.nan}, "eta"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"spacing": "karras"}, "karras"),
    ],
    ids=str,
)
def test_plan_refuses_what_does_not_exist(options, named):
    with pytest.raises(ValueError, match=named) as caught:
        ddpm.sampler_table(Schedule(), **options)
    assert "\n" not in str(caught.value)


# ---- guidance, part of the way, walks, what is known -------------------------------------------------------


def test_guidance_is_linear_and_one_call():
    calls = []

    def network(x, t, labels):
        calls.append((len(x), t.tolist(), labels.tolist()))
        return x * labels[:, None, None, None]

    x, labels = randn(2, *SHAPE), torch.tensor([3, 5])
    for guidance in (0.0, 1.0, 2.5):
        found = ddpm.guided(network, guidance, 7)(x, torch.tensor([10, 20]), labels)
        expected = x * (7 + guidance * (labels - 7))[:, None, None, None]
        assert error(found, expected) < 1e-5
    assert calls == [(4, [10, 20, 10, 20], [3, 5, 7, 7])] * 3


@pytest.mark.parametrize(
    "options", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}], ids=str
)
@pytest.mark.parametrize("strength", [0.001, 0.25, 0.6, 0.999])
def test_part_of_a_schedule_is_its_beginning(options, strength):
    schedule = Schedule(prediction_type="v_prediction", **options)
    part = ddpm.truncated(schedule, strength)
    count = max(2, round(1000 * strength))
    assert part.num_train_timesteps == count and error(part.alpha_bar, schedule.alpha_bar[:count]) < 1e-12
    assert part.prediction_type == "v_prediction" and ddpm.truncated(schedule, 1.0) is schedule
    steps = min(8, count)
    for sampler in ddpm.SAMPLERS:  # each ends on a clean image from there as well
        x0 = 0.5 * randn(1, *ODD).clamp(-1, 1)
        table = ddpm.sampler_table(part, sampler, steps, "trailing")
        first = int(table[0, ddpm.TIMESTEP])
        x = schedule.alpha[first] * x0 + schedule.sigma[first] * randn(1, *ODD, seed=1)

        def exact(x, t, labels, x0=x0):
            alpha, sigma = schedule.alpha[t], schedule.sigma[t]
            return (alpha * x - x0) / sigma  # v of this x0, by x = alpha x0 + sigma eps

        images = denoise(exact, table, lambda: randn(1, *ODD, seed=2), start=lambda _, x=x: x)
        assert (images - x0).abs().max() < 1e-4, sampler


@pytest.mark.parametrize("strength", [0, -1, 1.01, math.nan])
def test_strength_outside_of_the_schedule(strength):
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
        ddpm.truncated(Schedule(), strength)


def test_slerp_keeps_ends_length_and_angle():
    a, b = randn(1, *SHAPE), randn(1, *SHAPE, seed=1)
    for seed in range(20):
        ends = randn(2, *SHAPE, seed=seed).float().split(1)
        assert all(torch.equal(ddpm.slerp(*ends, float(end)), ends[end]) for end in (0, 1))
    b = b * (a.norm() / b.norm())
    whole = math.acos(float((a * b).sum() / a.norm() / b.norm()))
    for fraction in (0.1, 0.5, 0.8):
        between = ddpm.slerp(a, b, fraction)
        assert float(between.norm() / a.norm()) == pytest.approx(1, abs=1e-12)
        angle = math.acos(float((a * between).sum() / a.norm() / between.norm()))
        assert angle == pytest.approx(fraction * whole, abs=1e-9)
    assert torch.equal(ddpm.slerp(a, a, 0.3), a)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_what_is_known_is_kept_whatever_the_network_says(job):
    table = ddpm.sampler_table(Schedule(), *job)
    truth = randn(*ODD).clamp(-1, 1).float()
    known = truth.clone()
    known[:, :2] = math.nan
    images = denoise(elementwise, table, noise_from(generators(3), ODD), known=known)
    assert (images[:, :, 2:] - truth[:, 2:]).abs().max() < 1e-5 and images.isfinite().all()
    free = denoise(elementwise, table, noise_from(generators(3), ODD))
    assert torch.equal(free[:, :, :2], images[:, :, :2])  # an elementwise network sees no neighbours
    nothing = denoise(elementwise, table, noise_from(generators(3), ODD), known=torch.full(ODD, math.nan))
    assert torch.equal(nothing, free)
