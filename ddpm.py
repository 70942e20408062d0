"""The mathematics of diffusion: noise schedule, forward process, training loss, samplers. No network, no files.

Notation: x_t = alpha_t x0 + sigma_t eps with alpha_t^2 = alpha_bar_t and alpha_t^2 + sigma_t^2 = 1, t = 0 .. T-1;
lambda = log(alpha/sigma) is half the log signal-to-noise ratio. Tables are float64 on the CPU, computed once, and are
applied in the precision of the state, float32 or better.

A step is one call of the network for each image. Every sampler here is linear in x, in earlier estimates of x0 and in
fresh noise, so it is a function (schedule, timesteps) that returns a small matrix for each step. `sampler_table` makes
a table of them, one row a step, and `step` applies one row to each image: images at different steps of different
samplers can share a call of the network.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_large")
SPACINGS = ("leading", "linspace", "trailing", "logsnr")
LOSSES = ("mse", "min_snr")
DENSITIES = ("uniform", "lognormal")


# ---- noise schedule --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """The noise schedule, with the field names of diffusers' DDPMScheduler; it reads and writes its configuration."""

    num_train_timesteps: int = 1000  # T
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None  # explicit betas, which replace the four fields above
    variance_type: str = "fixed_small"  # of the ancestral sampler
    clip_sample: bool = True  # clamp estimates of x0 to +-clip_sample_range
    clip_sample_range: float = 1.0
    prediction_type: str = "epsilon"  # of PREDICTIONS
    timestep_spacing: str = "leading"  # of the ancestral sampler, with fewer than T steps
    steps_offset: int = 0  # added to "leading" timesteps
    rescale_betas_zero_snr: bool = False  # Lin et al. 2024, "Common Diffusion Noise Schedules ... Are Flawed", alg. 1

    def __post_init__(self):
        choices = {
            "beta_schedule": BETA_SCHEDULES,
            "variance_type": VARIANCES,
            "prediction_type": PREDICTIONS,
            "timestep_spacing": SPACINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not implemented; implemented: {allowed}")
        for name, least, most in (("num_train_timesteps", 2, 100_000), ("steps_offset", 0, 100_000)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(f"{len(self.trained_betas)} trained_betas for {self.num_train_timesteps} timesteps")
        betas = self.trained_betas or (self.beta_start, self.beta_end)
        if not all(0 < beta < 1 for beta in betas):
            raise ValueError("betas must lie between 0 and 1")
        for name in ("clip_sample", "rescale_betas_zero_snr"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.clip_sample and not self.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, not {self.clip_sample_range!r}")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction or sample: at the last timestep x_t is all "
                "noise, and a prediction of epsilon tells nothing about x0"
            )
        signal = self.alpha_bar
        if self.rescale_betas_zero_snr:  # the last one is zero on purpose
            signal = signal[:-1]
        if not (signal > 1e-30).all() or not (self.alpha_bar < 1).all():
            raise ValueError("these betas are too small or too large: a timestep would have no noise or no signal")

    @classmethod
    def from_dict(cls, config: dict) -> "Schedule":
        """Makes a schedule from a `scheduler_config.json`. Raises ValueError, which names what is not implemented."""
        kind = config.get("_class_name", "DDPMScheduler")
        if kind != "DDPMScheduler":
            raise ValueError(f"scheduler {kind!r} is not implemented; save the pipeline with a DDPMScheduler")
        if config.get("thresholding"):
            raise ValueError("thresholding is not implemented")
        unused = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
        config = {key: value for key, value in config.items() if not key.startswith("_") and key not in unused}
        unknown = config.keys() - {field.name for field in fields(cls)}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"the scheduler's configuration has keys that are not implemented: {names}")
        try:
            if config.get("trained_betas") is not None:
                config["trained_betas"] = tuple(config["trained_betas"])
            return cls(**config)
        except TypeError as error:  # for example a string instead of a number
            raise ValueError(f"the scheduler's configuration has a value of the wrong type: {error}") from error

    def to_dict(self) -> dict:
        """Returns the content of `scheduler_config.json`."""
        return {"thresholding": False, **asdict(self)}

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(T,) float64: the share of the signal in the variance of x_t, decreasing in t."""
        steps = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float64)
        elif self.beta_schedule == "linear":  # Ho et al. 2020, section 4
            betas = torch.linspace(self.beta_start, self.beta_end, steps, dtype=torch.float64)
        elif self.beta_schedule == "scaled_linear":  # Rombach et al. 2022
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, steps, dtype=torch.float64) ** 2
        elif self.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
            time = torch.arange(steps + 1, dtype=torch.float64) / steps
            f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        elif self.beta_schedule == "sigmoid":  # GeoDiff (Xu et al. 2022), as in diffusers
            sigmoid = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
            betas = sigmoid * (self.beta_end - self.beta_start) + self.beta_start
        else:
            raise ValueError(f"beta_schedule {self.beta_schedule!r} is not implemented")
        alpha_bar = torch.cumprod(1 - betas, 0)
        if self.rescale_betas_zero_snr:
            first, last = alpha_bar[0].sqrt(), alpha_bar[-1].sqrt()
            alpha_bar = ((alpha_bar.sqrt() - last) * first / (first - last)) ** 2
        return alpha_bar

    @property
    def alpha(self) -> Tensor:
        return self.alpha_bar.sqrt()

    @property
    def sigma(self) -> Tensor:
        return (1 - self.alpha_bar).sqrt()


# ---- training --------------------------------------------------------------------------------------------------------


def training_table(schedule: Schedule, loss: str = "mse", gamma: float = 5.0) -> Tensor:
    """Returns (T, 5) float64: alpha, sigma, coefficients of x0 and eps in the target, weight of the loss.

    The weight is 1, or min-SNR-gamma (Hang et al. 2023, section 3.4), which is stated there for the error of x0.
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    snr = alpha**2 / sigma**2
    # ratio: squared error of the prediction / squared error of x0
    on_x0, on_eps, ratio = {
        "epsilon": (zero, one, snr),
        "sample": (one, zero, one),
        "v_prediction": (-sigma, alpha, snr + 1),
    }[schedule.prediction_type]
    if loss == "mse":
        weight = one
    elif loss == "min_snr":
        weight = snr.clamp(max=gamma) / ratio
    else:
        raise ValueError(f"loss {loss!r} is not implemented; implemented: {LOSSES}")
    return torch.stack([alpha, sigma, on_x0, on_eps, weight], dim=1)


def noisy_and_target(table: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x_t and the target of the prediction, for x0 and eps (B, C, H, W), t (B,) and a training_table."""
    alpha, sigma, on_x0, on_eps, _ = table[t].to(x0.dtype)[..., None, None, None].unbind(1)
    return alpha * x0 + sigma * eps, on_x0 * x0 + on_eps * eps


def losses(table: Tensor, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
    """Returns the weighted mean squared error of each image, (B,) float32 (Ho et al. 2020, eq. 14)."""
    errors = (output.float() - target.float()).square()
    return table[t, 4].float() * errors.mean(dim=(1, 2, 3))


def timestep_cdf(schedule: Schedule, density: str = "uniform", mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Returns the cumulative distribution of the training timesteps, (T,) float64, for `choose_timesteps`.

    "lognormal": log(sigma/alpha) ~ N(mean, std^2), the noise levels of Karras et al. 2022 (EDM, table 1) on this
    schedule. A timestep has the density times the width of log(sigma/alpha) that it covers.
    """
    if density == "uniform":
        weights = torch.ones(schedule.num_train_timesteps, dtype=torch.float64)
    elif density == "lognormal":
        log_noise = (schedule.sigma / schedule.alpha).log()
        if log_noise[-1].isinf():  # zero terminal SNR: as far from its neighbour as the timesteps before it
            width = 1.0
            if len(log_noise) > 2:
                width = log_noise[-2] - log_noise[-3]
            log_noise[-1] = log_noise[-2] + width
        deviations = (log_noise - mean) / std
        weights = torch.exp(-(deviations**2) / 2) * torch.gradient(log_noise)[0]
    else:
        raise ValueError(f"timestep density {density!r} is not implemented; implemented: {DENSITIES}")
    if not weights.sum() > 0:
        raise ValueError(f"no timestep has noise near log(sigma/alpha) = {mean:g}; choose another mean or a larger std")
    return torch.cumsum(weights / weights.sum(), 0)


def choose_timesteps(cdf: Tensor, uniform: Tensor) -> Tensor:
    """Turns uniform numbers in [0, 1) into int64 timesteps, by inverse transform sampling."""
    return torch.searchsorted(cdf, uniform.to(cdf.dtype), right=True).clamp(max=len(cdf) - 1)


# ---- samplers: tables of coefficients --------------------------------------------------------------------------------

# Columns of a sampler's table: the timestep, the coefficients of x and of the network's output in the estimate of x0,
# the bound to which this estimate is clamped and, flattened, the matrix that maps the old state to the new one.
TIMESTEP, X0_FROM_X, X0_FROM_OUTPUT, CLIP, MATRIX = range(5)
# The state is x and three memories, in which a sampler keeps what it needs of earlier steps. These four are the rows of
# the matrix, and its first four columns; the others are the new estimate of x0 and fresh noise.
X, M1, M2, M3, X0, NOISE = range(6)
STATE, TERMS = 4, 6


def timesteps(schedule: Schedule, steps: int, spacing: str) -> list[int]:
    """Returns `steps` timesteps, descending. Raises ValueError unless 1 <= steps <= T.

    The first three spacings are those of Lin et al. 2024, table 2, and of diffusers; "logsnr" is uniform in lambda
    (Lu et al. 2022, DPM-Solver, section 3.4).
    """
    total = schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be from 1 to {total}, the timesteps this model was trained with, not {steps}")
    if spacing == "leading":
        stride = total // steps
        times = [i * stride + schedule.steps_offset for i in range(steps)]
        times.reverse()
    elif spacing == "linspace":
        stride = (total - 1) / max(steps - 1, 1)
        times = [round(i * stride) for i in range(steps)]
        times.reverse()
    elif spacing == "trailing":
        stride = (total - total / steps) - total  # rounded as in numpy.arange, for the same ties
        times = [round(total + i * stride) - 1 for i in range(steps)]
    elif spacing == "logsnr":
        times = _uniform_in_lambda(schedule, steps)
    else:
        raise ValueError(f"spacing {spacing!r} is not implemented; implemented: {SPACINGS}")
    if times[0] >= total:
        raise ValueError(f"steps_offset {schedule.steps_offset} goes beyond the last timestep with {steps} steps")
    return times


def _uniform_in_lambda(schedule: Schedule, steps: int) -> list[int]:
    """Returns the distinct timesteps nearest to equidistant values of lambda, descending, from T - 1."""
    total = schedule.num_train_timesteps
    lam = (schedule.alpha / schedule.sigma).log()
    if lam[-1].isinf():  # zero terminal SNR: space the others from the timestep before it
        lam[-1] = lam[-2]
    nodes = torch.linspace(float(lam[-1]), float(lam[0]), steps, dtype=torch.float64)
    rising = lam.flip(0)
    above = torch.searchsorted(rising, nodes).clamp(1, total - 1)
    nearest = torch.where(nodes - rising[above - 1] < rising[above] - nodes, above - 1, above)
    times = (total - 1 - nearest).tolist()
    times[0] = total - 1
    for i in range(1, steps):  # two nodes may have the same nearest timestep: move the later one down
        times[i] = min(times[i], times[i - 1] - 1)
    return [max(time, steps - 1 - i) for i, time in enumerate(times)]  # and back up, where that went below 0


def _levels(schedule: Schedule, times: Sequence[int]) -> tuple[Tensor, ...]:
    """Returns alpha_bar, alpha and sigma, (S + 1,) each: at the S listed timesteps and, last, at the clean image."""
    alpha_bar = torch.cat([schedule.alpha_bar[list(times)], torch.ones(1, dtype=torch.float64)])
    return alpha_bar, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _no_terms(times: Sequence[int]) -> Tensor:
    """Returns the matrices of S steps, (S, 4, 6), with all coefficients 0."""
    return torch.zeros(len(times), STATE, TERMS, dtype=torch.float64)


def ddpm(schedule: Schedule, times: Sequence[int]) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2 and eq. 7), respaced to the listed timesteps (Nichol & Dhariwal
    2021, section 4). No noise is added at the last step, whatever its timestep."""
    alpha_bar, _, _ = _levels(schedule, times)
    now, previous = alpha_bar[:-1], alpha_bar[1:]
    alpha = now / previous
    beta = 1 - alpha
    variance = beta
    if schedule.variance_type == "fixed_small":
        variance = beta * (1 - previous) / (1 - now)
    matrix = _no_terms(times)
    matrix[:, X, X] = alpha.sqrt() * (1 - previous) / (1 - now)
    matrix[:, X, X0] = previous.sqrt() * beta / (1 - now)
    matrix[:-1, X, NOISE] = variance[:-1].sqrt()
    return matrix


def ddim(schedule: Schedule, times: Sequence[int], eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 and 16).

    eta 0 is deterministic, eta 1 adds as much noise as ancestral sampling. A step goes to the next listed timestep, and
    epsilon is derived from the clipped x0.
    """
    alpha_bar, alpha, sigma = _levels(schedule, times)
    now, previous = alpha_bar[:-1], alpha_bar[1:]
    noise = eta * ((1 - previous) / (1 - now) * (1 - now / previous)).sqrt()
    direction = (1 - previous - noise**2).clamp(min=0).sqrt() / sigma[:-1]  # times x - alpha X0 = sigma eps
    matrix = _no_terms(times)
    matrix[:, X, X] = direction
    matrix[:, X, X0] = alpha[1:] - direction * alpha[:-1]
    matrix[:-1, X, NOISE] = noise[:-1]
    return matrix


def dpm_solver_pp(schedule: Schedule, times: Sequence[int]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2). Memory 1 is the last estimate of x0."""
    _, alpha, sigma = _levels(schedule, times)
    matrix = _no_terms(times)
    matrix[:, X, X], matrix[:, X, X0], matrix[:, X, M1] = _multistep(alpha, sigma)
    matrix[:, M1, X0] = 1
    return matrix


def _multistep(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
    """Returns the coefficients of DPM-Solver++(2M), (S,) each: of x, of the new estimate of x0 and of the last one.

    The first step, which has no last estimate, and the last step, which ends at sigma = 0, are of first order.
    """
    h = torch.diff((alpha / sigma).log())
    gain = -alpha[1:] * torch.expm1(-h)
    slope = torch.zeros_like(h)
    slope[1:-1] = 0.5 * h[1:-1] / h[:-2]
    return sigma[1:] / sigma[:-1], gain * (1 + slope), -gain * slope


def unipc(schedule: Schedule, times: Sequence[int]) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1, "bh2" (Zhao et al. 2023, algorithms 5 and 6), on estimates of x0.

    Each step first corrects the x predicted by the last step, with the estimate of x0 made from it, then predicts the
    next x with DPM-Solver++(2M): one call of the network. Memories: M1 is the corrected x and M2 the estimate of the
    last step, M3 the estimate before it.
    """
    _, alpha, sigma = _levels(schedule, times)
    corrected = _unipc_corrector(alpha[:-1], sigma[:-1])
    on_x, on_x0, on_last = _multistep(alpha, sigma)
    matrix = _no_terms(times)
    matrix[:, X] = on_x[:, None] * corrected
    matrix[:, X, X0] += on_x0
    matrix[:, X, M2] += on_last
    matrix[:, M1] = corrected
    matrix[:, M2, X0] = 1
    matrix[:, M3, M2] = 1
    return matrix


def _unipc_corrector(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns the corrected x of each of S steps as coefficients of the terms, (S, 6), for alpha and sigma (S,).

    The first step corrects nothing, and the second is of first order.
    """
    h = torch.diff((alpha / sigma).log())  # of the steps before: one less
    gain = -alpha[1:] * torch.expm1(-h)
    on_m2, on_x0 = torch.zeros_like(h), torch.full_like(h, 0.5)  # times M2 - M3, and times X0 - M2
    q, ratio = -h[1:], -h[:-1] / h[1:]
    e = torch.expm1(q)
    b1 = (e / q - 1) / e
    b2 = 2 * ((e / q - 1) / q - 0.5) / e
    rho = (b1 - b2) / (1 - ratio)
    on_m2[1:], on_x0[1:] = -rho / ratio, b1 - rho
    corrected = torch.zeros(len(alpha), TERMS, dtype=torch.float64)
    corrected[0, X] = 1
    corrected[1:, M1] = sigma[1:] / sigma[:-1]
    corrected[1:, X0] = gain * on_x0
    corrected[1:, M2] = gain * (1 + on_m2 - on_x0)
    corrected[1:, M3] = -gain * on_m2
    return corrected


def ipndm(schedule: Schedule, times: Sequence[int]) -> Tensor:
    """Improved PNDM of order 4 (Zhang & Chen 2023, DEIS, appendix H.2; Liu et al. 2022).

    Adams-Bashforth steps of d(x/alpha) = eps d(sigma/alpha), with the coefficients of equal steps. The memories are the
    last three estimates of eps. The first steps are of order 1, 2 and 3, and the last is of order 1.
    """
    _, alpha, sigma = _levels(schedule, times)
    eps = torch.zeros(len(times), TERMS, dtype=torch.float64)
    eps[:, X], eps[:, X0] = 1 / sigma[:-1], -alpha[:-1] / sigma[:-1]
    adams_bashforth = [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]]
    adams_bashforth += [[55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    order = torch.arange(len(times)).clamp(max=3)
    order[-1] = 0
    weights = torch.tensor(adams_bashforth, dtype=torch.float64)[order]
    length = sigma[1:] - alpha[1:] * sigma[:-1] / alpha[:-1]  # alpha times the change of sigma/alpha
    length[0] = 0  # unused, and infinite for alpha = 0
    matrix = _no_terms(times)
    matrix[:, X] = sigma[1:, None] * eps  # DDIM, order 1, in a form that holds for alpha = 0
    matrix[:, X, X0] += alpha[1:]
    matrix[:, X] += (length * (weights[:, 0] - 1))[:, None] * eps
    matrix[:, X, M1 : M3 + 1] += length[:, None] * weights[:, 1:]
    matrix[:, M1] = eps
    matrix[:, M2, M1] = 1
    matrix[:, M3, M2] = 1
    return matrix


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver_pp, "unipc": unipc, "ipndm": ipndm}
# benchmarks/samplers.md, -base, -nano: at 10 steps ipndm is nearest, or nearly, to a draw of 200 steps, and KID hardly
# falls after 8 to 10.
DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_SPACING = "ipndm", 10, "trailing"


def sampler_table(
    schedule: Schedule,
    sampler: str = DEFAULT_SAMPLER,
    steps: int | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Returns the table of a named sampler. Raises ValueError, one sentence, for a name or number that does not exist.

    steps    default: 10, or T for "ddpm"
    spacing  default: "trailing", or the schedule's own for "ddpm"
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not implemented; implemented: {', '.join(SAMPLERS)}")
    if eta and sampler != "ddim" or not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, and needs the sampler ddim; got {eta} with {sampler}")
    default_steps, default_spacing = min(DEFAULT_STEPS, schedule.num_train_timesteps), DEFAULT_SPACING
    if sampler == "ddpm":
        default_steps, default_spacing = schedule.num_train_timesteps, schedule.timestep_spacing
    times = timesteps(schedule, default_steps if steps is None else steps, spacing or default_spacing)
    options = {"eta": eta} if sampler == "ddim" else {}
    return table_of(schedule, times, SAMPLERS[sampler](schedule, times, **options))


def table_of(schedule: Schedule, times: Sequence[int], matrix: Tensor) -> Tensor:
    """Returns the table (S, 28) of a sampler's matrices (S, 4, 6) for S timesteps of a schedule."""
    _, alpha, sigma = (values[:-1] for values in _levels(schedule, times))
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    x0_from_x, x0_from_output = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (zero, one),
        "v_prediction": (alpha, -sigma),
    }[schedule.prediction_type]
    clip = schedule.clip_sample_range if schedule.clip_sample else math.inf
    columns = torch.stack([torch.tensor(times).double(), x0_from_x, x0_from_output, one * clip], dim=1)
    assert columns[:, :CLIP].isfinite().all() and matrix.isfinite().all()
    return torch.cat([columns, matrix.flatten(1)], dim=1)


# ---- steps -----------------------------------------------------------------------------------------------------------


def truncated(schedule: Schedule, strength: float) -> Schedule:
    """Returns a schedule of the first timesteps of another: the share `strength` of them, above 0 and at most 1.

    A picture noised to its last timestep can be denoised with it (Meng et al. 2022, "SDEdit", section 3). Raises
    ValueError for another number.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, not {strength:g}")
    count = max(2, round(strength * schedule.num_train_timesteps))
    if count == schedule.num_train_timesteps:
        return schedule
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar[:count]])
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    return replace(
        schedule, num_train_timesteps=count, trained_betas=tuple(betas.tolist()), rescale_betas_zero_snr=False
    )


def guided(network: Callable, guidance: float, null: int) -> Callable:
    """Returns a network with classifier-free guidance (Ho & Salimans 2022, eq. 6, with w = guidance - 1).

    Its prediction is p(null) + guidance * (p(class) - p(null)), where p(label) is the network's. Both come from one
    call.
    """

    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, null)]))
        with_class, without = both.float().chunk(2)
        return without + guidance * (with_class - without)

    return predict


def slerp(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Returns the tensor that lies `fraction` of the way from a to b on the arc between them.

    Between two samples of normal noise it is normal noise again (Shoemake 1985, section 3.3).
    """
    angle = F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).clamp(-1, 1).acos()
    if fraction == 1:  # the ends to the bit
        return b
    if fraction == 0 or angle < 1e-6:
        return a
    mixed = ((1 - fraction) * angle).sin() * a + (fraction * angle).sin() * b
    return (mixed / angle.sin()).to(a.dtype)


def initial_state(x: Tensor) -> Tensor:
    """x_T (N, C, H, W) -> state (N, 4, C, H, W) with empty memories."""
    return torch.cat([x[:, None], x.new_zeros(len(x), STATE - 1, *x.shape[1:])], dim=1)


def step(
    state: Tensor, output: Tensor, rows: Tensor, noise: Tensor | None = None, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Applies one step to each image, by its own row. This is the only place where a sampler's formula is applied.

    state   (N, 4, C, H, W) float32 or float64
    output  (N, C, H, W), the network's output for x = state[:, 0]
    rows    (N, 28) float64 on the CPU
    noise   (N, C, H, W); needed if a row has a coefficient for it
    known   (N, C, H, W) or (C, H, W): x0 where it is known, NaN elsewhere; it replaces the estimate there

    Returns the new state and the estimates of x0 (N, C, H, W). The result of an image depends on its own row, state,
    output, noise and known part alone.
    """
    matrix = rows[:, MATRIX:].unflatten(1, (STATE, TERMS))
    used = (matrix != 0).any(dim=0).tolist()  # terms that no image needs are skipped, not multiplied by zero
    numbers = rows.to(state.device, state.dtype)[..., None, None, None]  # (N, 28, 1, 1, 1)
    x0 = numbers[:, X0_FROM_X] * state[:, X] + numbers[:, X0_FROM_OUTPUT] * output.to(state.dtype)
    x0 = torch.clamp(x0, -numbers[:, CLIP], numbers[:, CLIP])
    if known is not None:
        x0 = torch.where(known.isnan(), x0, known)
    terms = [*state.unbind(1), x0, noise]
    new = torch.zeros_like(state)
    for i in range(STATE):
        for j in range(TERMS):
            if used[i][j]:
                new[:, i].addcmul_(numbers[:, MATRIX + i * TERMS + j], terms[j])
    return new, x0


def needs_noise(row: Tensor) -> bool:
    """Returns whether a step adds fresh noise to x; if not, no number is taken from a generator."""
    return bool(row[MATRIX + NOISE] != 0)


def normal(generators: Sequence[torch.Generator], shape: Sequence[int], patch_size: int = 1) -> Tensor:
    """Returns one standard normal image of shape (C, H, W) from each generator: (N, C, H, W) float32 on their device.

    With patches the numbers are generated in the inner network's layout (C p^2, H/p, W/p) and then pixel-shuffled, so
    that the inner network, opened in diffusers, gets the same noise from the same generator.
    """
    channels, height, width = shape
    inner = (1, channels * patch_size**2, height // patch_size, width // patch_size)
    drawn = torch.cat([torch.randn(inner, generator=g, device=g.device) for g in generators])
    return F.pixel_shuffle(drawn, patch_size)
