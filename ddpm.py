"""The mathematics of diffusion: noise schedule, forward process, training loss, samplers. No network, no files.

Notation: x_t = alpha_t x0 + sigma_t eps with alpha_t^2 = alpha_bar_t and alpha_t^2 + sigma_t^2 = 1, t = 0 .. T-1;
lambda = log(alpha/sigma) is half the log signal-to-noise ratio. Tables are float64 on the CPU, computed once, and are
applied in the precision of the state, float32 or better.

A step is one call of the network for each image. A sampler is a function (schedule, timesteps) -> table, with one row a
step, and `step` applies one row to each image. Every sampler here is linear in x, in earlier estimates and in fresh
noise, so a row is a small matrix, and images at different steps of different samplers can share a call of the network.
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
    # The last number: the squared error of the prediction in units of the squared error of x0.
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
    """Turns uniform numbers in [0, 1) into int64 timesteps, by inversion of their distribution."""
    return torch.searchsorted(cdf, uniform.to(cdf.dtype), right=True).clamp(max=len(cdf) - 1)


# ---- samplers: tables of coefficients --------------------------------------------------------------------------------

# A row of a table: the timestep, the coefficients of x and of the network's output in the estimate of x0, the bound
# that clamps this estimate, and a matrix that maps the old state to the new one.
TIMESTEP, X0_FROM_X, X0_FROM_OUTPUT, CLIP, MATRIX = range(5)
# The state is x and three memories, which each sampler uses as it needs. The matrix has a row for each of them, and a
# column for each of them, the new estimate of x0, and fresh noise.
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


def _path(schedule: Schedule, times: Sequence[int]) -> tuple[Tensor, ...]:
    """Returns alpha_bar, alpha and sigma, (S + 1,) each: at the listed timesteps and, last, at the clean image."""
    alpha_bar = torch.cat([schedule.alpha_bar[list(times)], torch.ones(1, dtype=torch.float64)])
    return alpha_bar, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _table(schedule: Schedule, times: Sequence[int], matrix: Tensor) -> Tensor:
    """Adds the columns that are the same for all samplers to a sampler's matrices (S, 4, 6): a table (S, 28)."""
    _, alpha, sigma = (values[:-1] for values in _path(schedule, times))
    table = torch.empty(len(times), MATRIX, dtype=torch.float64)
    table[:, TIMESTEP] = torch.tensor(times)
    if schedule.prediction_type == "epsilon":
        table[:, X0_FROM_X], table[:, X0_FROM_OUTPUT] = 1 / alpha, -sigma / alpha
    elif schedule.prediction_type == "sample":
        table[:, X0_FROM_X], table[:, X0_FROM_OUTPUT] = 0, 1
    elif schedule.prediction_type == "v_prediction":
        table[:, X0_FROM_X], table[:, X0_FROM_OUTPUT] = alpha, -sigma
    table[:, CLIP] = schedule.clip_sample_range if schedule.clip_sample else math.inf
    assert table[:, :CLIP].isfinite().all() and matrix.isfinite().all()
    return torch.cat([table, matrix.flatten(1)], dim=1)


def _zeros(times: Sequence[int]) -> Tensor:
    return torch.zeros(len(times), STATE, TERMS, dtype=torch.float64)


def ddpm(schedule: Schedule, times: Sequence[int]) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2 and eq. 7), respaced to the listed timesteps (Nichol & Dhariwal
    2021, section 4). No noise is added at the last step, whatever its timestep."""
    alpha_bar, _, _ = _path(schedule, times)
    now, previous = alpha_bar[:-1], alpha_bar[1:]
    alpha = now / previous
    beta = 1 - alpha
    variance = beta
    if schedule.variance_type == "fixed_small":
        variance = beta * (1 - previous) / (1 - now)
    matrix = _zeros(times)
    matrix[:, X, X] = alpha.sqrt() * (1 - previous) / (1 - now)
    matrix[:, X, X0] = previous.sqrt() * beta / (1 - now)
    matrix[:-1, X, NOISE] = variance[:-1].sqrt()
    return _table(schedule, times, matrix)


def ddim(schedule: Schedule, times: Sequence[int], eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 and 16).

    eta 0 is deterministic, eta 1 adds as much noise as ancestral sampling. A step goes to the next listed timestep, and
    epsilon is derived from the clipped x0.
    """
    alpha_bar, alpha, sigma = _path(schedule, times)
    now, previous = alpha_bar[:-1], alpha_bar[1:]
    noise = eta * ((1 - previous) / (1 - now) * (1 - now / previous)).sqrt()
    direction = (1 - previous - noise**2).clamp(min=0).sqrt() / sigma[:-1]  # times x - alpha X0 = sigma eps
    matrix = _zeros(times)
    matrix[:, X, X] = direction
    matrix[:, X, X0] = alpha[1:] - direction * alpha[:-1]
    matrix[:-1, X, NOISE] = noise[:-1]
    return _table(schedule, times, matrix)


def dpm_solver_pp(schedule: Schedule, times: Sequence[int]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2). Memory 1 is the last estimate of x0.

    It is of first order at the first step and at the last one, which ends at sigma = 0.
    """
    _, alpha, sigma = _path(schedule, times)
    h = torch.diff((alpha / sigma).log())
    matrix = _zeros(times)
    for i in range(len(times)):
        slope = _slope(h, i)  # times X0 - M1
        gain = -alpha[i + 1] * torch.expm1(-h[i])
        matrix[i, X, X] = sigma[i + 1] / sigma[i]
        matrix[i, X, X0] = gain * (1 + slope)
        matrix[i, X, M1] = -gain * slope
        matrix[i, M1, X0] = 1
    return _table(schedule, times, matrix)


def _slope(h: Tensor, i: int) -> float:
    """Coefficient of the difference of the last two estimates of x0 in step i; 0 at the first and the last step."""
    if 0 < i < len(h) - 1:
        return float(0.5 * h[i] / h[i - 1])
    return 0.0


def unipc(schedule: Schedule, times: Sequence[int]) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1, "bh2" (Zhao et al. 2023, algorithms 5 and 6), on estimates of x0.

    Each step first corrects the x predicted by the last step, with the estimate of x0 made from it, then predicts the
    next x with DPM-Solver++(2M): one call of the network. Memories: M1 is the corrected x and M2 the estimate of the
    last step, M3 the estimate before it. It is of first order at the first step and the last.
    """
    _, alpha, sigma = _path(schedule, times)
    h = torch.diff((alpha / sigma).log())
    matrix = _zeros(times)
    for i in range(len(times)):
        corrected = _unipc_corrector(alpha, sigma, h, i)
        slope = _slope(h, i)  # times X0 - M2
        gain = -alpha[i + 1] * torch.expm1(-h[i])
        matrix[i, X] = sigma[i + 1] / sigma[i] * corrected
        matrix[i, X, X0] += gain * (1 + slope)
        matrix[i, X, M2] -= gain * slope
        matrix[i, M1] = corrected
        matrix[i, M2, X0] = 1
        matrix[i, M3, M2] = 1
    return _table(schedule, times, matrix)


def _unipc_corrector(alpha: Tensor, sigma: Tensor, h: Tensor, i: int) -> Tensor:
    """Returns the corrected x of step i as coefficients of the terms, (6,)."""
    corrected = torch.zeros(TERMS, dtype=torch.float64)
    if i == 0:
        corrected[X] = 1
        return corrected
    gain = -alpha[i] * torch.expm1(-h[i - 1])
    on_m2, on_x0 = 0.0, 0.5  # times M2 - M3, and times X0 - M2
    if i > 1:
        q, ratio = -h[i - 1], -h[i - 2] / h[i - 1]
        e = torch.expm1(q)
        b1 = (e / q - 1) / e
        b2 = 2 * ((e / q - 1) / q - 0.5) / e
        rho = (b1 - b2) / (1 - ratio)
        on_m2, on_x0 = -rho / ratio, b1 - rho
    corrected[M1] = sigma[i] / sigma[i - 1]
    corrected[X0] = gain * on_x0
    corrected[M2] = gain * (1 + on_m2 - on_x0)
    corrected[M3] = -gain * on_m2
    return corrected


def ipndm(schedule: Schedule, times: Sequence[int]) -> Tensor:
    """Improved PNDM of order 4 (Zhang & Chen 2023, DEIS, appendix H.2; Liu et al. 2022).

    Adams-Bashforth steps of d(x/alpha) = eps d(sigma/alpha), with the coefficients of equal steps. The memories are the
    last three estimates of eps. The first steps are of order 1, 2 and 3, and the last is of order 1.
    """
    _, alpha, sigma = _path(schedule, times)
    adams_bashforth = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    matrix = _zeros(times)
    for i in range(len(times)):
        eps = torch.zeros(TERMS, dtype=torch.float64)
        eps[X], eps[X0] = 1 / sigma[i], -alpha[i] / sigma[i]
        matrix[i, X] = sigma[i + 1] * eps  # DDIM, order 1, in a form that holds for alpha = 0
        matrix[i, X, X0] += alpha[i + 1]
        if 0 < i < len(times) - 1:
            step = sigma[i + 1] - alpha[i + 1] * sigma[i] / alpha[i]  # alpha times the change of sigma/alpha
            first, *rest = adams_bashforth[min(i, 3)]
            matrix[i, X] += step * (first - 1) * eps
            for memory, coefficient in zip((M1, M2, M3), rest, strict=False):
                matrix[i, X, memory] += step * coefficient
        matrix[i, M1], matrix[i, M2, M1], matrix[i, M3, M2] = eps, 1, 1
    return _table(schedule, times, matrix)


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
    if steps is None:
        steps = default_steps
    times = timesteps(schedule, steps, spacing or default_spacing)
    if sampler == "ddim":
        return ddim(schedule, times, eta)
    return SAMPLERS[sampler](schedule, times)


# ---- steps -----------------------------------------------------------------------------------------------------------


def up_to(schedule: Schedule, strength: float) -> Schedule:
    """Returns the first `strength` (above 0, at most 1) of a schedule's timesteps, as a schedule.

    An image that is noised to its last timestep is denoised on it like any other (Meng et al. 2022, "SDEdit", section
    3). Raises ValueError for another number.
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
    """Returns a network with classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is guidance - 1).

    Its prediction is the one without a class (label `null`) plus `guidance` times the difference that the class makes,
    from one call for both.
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
    share_a = ((1 - fraction) * angle).sin() / angle.sin()
    share_b = (fraction * angle).sin() / angle.sin()
    return (share_a * a + share_b * b).to(a.dtype)


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
