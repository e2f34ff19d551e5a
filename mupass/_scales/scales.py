"""The scale table: parameterization x optimizer x geometry -> width factors.

One argument gives every row. Let a coordinate of an activation be Theta(1), let the readout start at
``1/fan_in**beta`` and let ``delta`` be the gradient of the output with respect to a pre-activation.
Relative to the base width, with ``m_in`` and ``m_out`` the multipliers of a parameter's two fans,

    |h|^2     ~ m_in                    a row of the weight meets m_in times as many inputs,
    delta_i   ~ 1/m_out**beta           (m_out = 1 at the readout, whose outputs are finite),
    |delta|^2 ~ m_out**(1 - 2 beta),

and one step must move the model's output by Theta(1) *through this layer alone*, that is
``delta . (dW h) = Theta(1)``. Putting in each optimizer's ``dW`` leaves one learning rate. With
``beta = 1`` that step also moves every hidden coordinate by Theta(1): feature learning (Ishikawa &
Karakida, arXiv 2312.12226, conditions 11-13). With ``beta = 1/2`` hidden coordinates move by
``1/sqrt(m)``: the lazy limit.

Where the code itself gives ``h`` the order ``m**given`` (a tensor of unit length has entries of order
``m**-1/2``), the weight starts larger by ``m**-given`` and every ``|h|`` above has that order too.

A parameter with no fan_in axis (bias, gain) has ``m_in = 1``; a finite fan has multiplier 1. So the
rows "input", "hidden", "output" and "vector" of the papers' tables need no case of their own here.
"""

from dataclasses import dataclass, fields, replace

from mupass._records import Geometry
from mupass._scales.optimizers import GRADIENT_ENTRY, OptimizerSpec, Order
from mupass._scales.parameterizations import row

Powers = tuple[float, float]  # of m_in and of m_out


@dataclass(frozen=True)
class Scales:
    """Width factors of one parameter, all exactly 1.0 at the base width.

    Attributes:
        init: Factor on the std of the initialization at the base width.
        multiplier: Forward factor on the input of the readout uses of a tied embedding; else 1.
        lr: Factor on the learning rate.
        damping_in: Factor on absolute damping of the input side: K-FAC's A, Shampoo's R.
        damping_out: Factor on absolute damping of the output side: K-FAC's B, Shampoo's L.
        epsilon: Factor on epsilon: the order of what it is added to. For Adam one gradient entry; for Muon
            and SOAP the norm of the gradient matrix; for AdaMuon one entry of the orthogonal matrix.
        weight_decay: Factor on decoupled decay that does not depend on the learning rate.
        lr_powers: Powers of ``(m_in, m_out)`` that make up ``lr``.
    """

    init: float
    multiplier: float
    lr: float
    damping_in: float
    damping_out: float
    epsilon: float
    weight_decay: float
    lr_powers: Powers


SCALES = tuple(scale.name for scale in fields(Scales) if scale.name != "lr_powers")
NONE = (0.0, 0.0)


def scales(geometry: Geometry, optimizer: OptimizerSpec, parameterization: str = "mup") -> Scales:
    """Width factors of one parameter.

    Args:
        geometry: Fans of the parameter and their base sizes.
        optimizer: Family and powers.
        parameterization: ``mup``, ``standard``, ``ntk`` or ``mean_field``.

    Returns:
        Factors relative to the base width. For ``standard`` all are 1: the user's initialization
        and one learning rate stand, whatever the width.
    """
    table = powers(geometry, optimizer, parameterization)
    factors = {name: factor_of(geometry, of_scale) for name, of_scale in table.items()}
    for name, power in depth_powers(optimizer, parameterization).items():
        factors[name] *= geometry.depth**power
    for name, (p_behind, p_front) in folded_powers(optimizer).items():
        factors[name] *= geometry.folded**p_behind * geometry.folded_in**p_front
    for name, power in length_powers(optimizer, parameterization).items():
        factors[name] *= geometry.m_direction**power
    return Scales(**factors, lr_powers=table["lr"])


def factor_of(geometry: Geometry, powers: Powers) -> float:
    """Return ``m_in**p_in * m_out**p_out`` of a parameter.

    Args:
        geometry: Its fans.
        powers: The two powers.
    """
    return geometry.m_in ** powers[0] * geometry.m_out ** powers[1]


def rounded(factor: float) -> float:
    """Return twelve digits: base sizes that are not whole numbers leave rounding errors in the last ones.

    Args:
        factor: One of the scales.
    """
    return float(f"{factor:.12g}")


def powers(geometry: Geometry, optimizer: OptimizerSpec, parameterization: str = "mup") -> dict[str, Powers]:
    """Powers of ``(m_in, m_out)`` in each scale of one parameter.

    Args:
        geometry: Role and uses of the parameter.
        optimizer: Family and powers.
        parameterization: Key of `PARAMETERIZATIONS`.

    Returns:
        Scale name (a field of `Scales`) -> ``(power of m_in, power of m_out)``.
    """
    table = dict.fromkeys(SCALES, NONE)  # decay: Qiu et al., arXiv 2512.05620: independent decay is Theta(1)
    beta = row(parameterization).readout_power
    if beta is None:
        if optimizer.alignment:  # one rate for each layer, on the user's 1/sqrt(fan_in)
            table["lr"] = aligned_powers(geometry, optimizer, 0.5)
            table["epsilon"] = order_powers(_epsilon(optimizer), replace(geometry, given=0.0), 0.5)
        return table
    table["init"] = init_powers(geometry, parameterization)
    geometry = _as_multiplied(geometry, beta)
    if geometry.readout_uses:
        # A tied embedding has entries of Theta(1) where a readout has 1/m**beta; m is its kept axis.
        table["multiplier"] = (0.0, -beta - geometry.given)
    rates = aligned_powers if optimizer.alignment else lr_powers
    table["lr"] = rates(geometry, optimizer, beta)
    table["damping_in"] = order_powers(optimizer.row.damping_in, geometry, beta)
    table["damping_out"] = order_powers(optimizer.row.damping_out, geometry, beta)
    table["epsilon"] = order_powers(_epsilon(optimizer), geometry, beta)
    return table


def init_powers(geometry: Geometry, parameterization: str) -> Powers:
    """Powers of ``(m_in, m_out)`` in the std of the initialization, whatever the optimizer.

    Args:
        geometry: Role and uses of the parameter.
        parameterization: Key of `PARAMETERIZATIONS`; ``standard`` leaves the user's values.
    """
    beta = row(parameterization).readout_power
    if beta is None:
        return NONE
    # The weight undoes the power that the code gives what it is multiplied with.
    return _plus((-_weight_power(geometry, beta), 0.0), _as_multiplied(geometry, beta), -1)


def init_scale(geometry: Geometry, parameterization: str) -> float:
    """Width factor on the std of the initialization of one parameter, whatever the optimizer.

    Args:
        geometry: Fans of the parameter and their base sizes.
        parameterization: Key of `PARAMETERIZATIONS`.
    """
    beta = row(parameterization).readout_power
    if beta is None:
        return 1.0
    # The length of a readout under weight norm, see `length_powers`.
    of_length = geometry.m_direction ** (0.5 - beta)
    return factor_of(geometry, init_powers(geometry, parameterization)) * of_length


def order_powers(order: Order, geometry: Geometry, beta: float) -> Powers:
    """Powers of ``(m_in, m_out)`` in what damping or epsilon is added to (arXiv 2512.05620).

    ``|h| ~ m_in^(1/2)`` and ``|delta| ~ m_out^(1/2 - beta)``.

    Args:
        order: What it is, in ``|h|`` and ``|delta|``.
        geometry: Role and uses of the parameter.
        beta: Readout power of the parameterization.
    """
    p_in = order.h / 2 + order.per_input
    p_out = order.delta * (0.5 - beta) + order.per_output
    # What a gain multiplies is part of its B, for it has no axis to sum over.
    times = order.h if geometry.fan_in_axes else order.delta
    return _plus((p_in, p_out), geometry, times)


def _epsilon(optimizer: OptimizerSpec) -> Order:
    """Return what epsilon is added to; where there is none, what Adam's would be."""
    return optimizer.row.epsilon or GRADIENT_ENTRY


def _as_multiplied(geometry: Geometry, beta: float) -> Geometry:
    """Return the readout's direction under weight norm as one that ``g/|v|`` multiplies: `length_powers`."""
    if geometry.length and geometry.role == "output":
        return replace(geometry, given=geometry.given - (beta - 0.5))
    return geometry


def _plus(powers: Powers, geometry: Geometry, times: float) -> Powers:
    """Add multiples of the power that the code gives what the parameter is multiplied with."""
    if geometry.readout_uses:  # the multiplier undoes it
        return powers
    p_in, p_out = powers
    # A weight multiplies what the code scales by its fan_in; a gain by its fan_out.
    if geometry.fan_in_axes:
        return p_in + geometry.given * times, p_out
    return p_in, p_out + geometry.given * times


def length_powers(optimizer: OptimizerSpec, parameterization: str) -> dict[str, float]:
    """Powers of the readout's ``m_in`` in the scales of its length under weight norm, ``W = g v / |v|``.

    ``W ~ m_in^-beta`` and ``v/|v| ~ m_in^-1/2`` leave ``g ~ m_in^(1/2 - beta)``. What g multiplies is
    ``v.h / |v|``, of order ``m_in^(beta - 1/2)`` once v is aligned with h, and so is the gradient of g.

    Args:
        optimizer: Family and powers.
        parameterization: Key of `PARAMETERIZATIONS`; ``standard`` scales nothing.
    """
    beta = row(parameterization).readout_power
    if beta is None:
        return {}
    order = beta - 0.5
    return {"init": -order, "lr": 2 * order * (optimizer.step.e_out - 1), "epsilon": order}


def depth_powers(optimizer: OptimizerSpec, parameterization: str) -> dict[str, float]:
    """Powers of the relative depth L in the scales of a parameter inside one of L residual branches.

    Branches are multiplied by ``1/L`` (Yang et al., arXiv 2310.02244; Qiu et al., arXiv 2512.05620), so
    ``delta ~ 1/L`` there, and L branches together must move the output by Theta(1): ``delta . (dW h) = 1/L``.
    With ``dW`` as in `lr_powers` the rate is ``L^(1 - 2 e)``, where e is the total power on ``delta``: 0 for
    SGD, 1/2 where the size of the gradient drops out. Damping goes like ``|delta|^2``, epsilon like
    ``delta``.

    Args:
        optimizer: Family and powers.
        parameterization: Key of `PARAMETERIZATIONS`; ``standard`` scales nothing.
    """
    if row(parameterization).readout_power is None:
        return {}
    # What is damped holds delta to some power, and delta goes like 1/L in a branch.
    small_numbers = {scale: -order.delta for scale, order in _orders(optimizer).items()}
    return {"lr": optimizer.step.gradient_power, **small_numbers}


def folded_powers(optimizer: OptimizerSpec) -> dict[str, Powers]:
    """Powers of a factor that `mupass.fold` put into a parameter, in its scales: training goes on as before.

    ``W' = c W`` in the place of a multiplier ``c`` behind ``W`` must change by ``c dW``, from gradients
    ``G' = G/c``, ``delta' = delta/c``. With e the total power on ``delta`` the rate goes like
    ``c^(2 - 2 e)``, and like ``c^(1 - 2 e)`` for steps relative to the weights. Where ``W'`` undoes ``c`` in
    front of it, the same holds with ``h`` in the place of ``delta``.

    Args:
        optimizer: Family and powers.

    Returns:
        Scale -> powers of the factor behind the parameter, and of the one that undoes another in front of it.
    """
    step = optimizer.step
    # A step that is relative to the weight is larger by c already.
    of_weight = 1 if step.relative else 2
    small_numbers = {scale: (-order.delta, -order.h) for scale, order in _orders(optimizer).items()}
    return {"lr": (of_weight - 2 * step.e_out, of_weight - 2 * step.e_in), **small_numbers}


def _orders(optimizer: OptimizerSpec) -> dict[str, Order]:
    """Return what damping and epsilon are added to, of those that the optimizer has."""
    orders = {"damping_in": optimizer.row.damping_in, "damping_out": optimizer.row.damping_out}
    if optimizer.row.epsilon is not None:
        orders["epsilon"] = optimizer.row.epsilon
    return orders


def lr_powers(geometry: Geometry, optimizer: OptimizerSpec, beta: float) -> Powers:
    """Powers of ``(m_in, m_out)`` in the learning rate, from ``delta . (dW h) = Theta(1)``.

    * SGD, ``dW = delta h^T``: ``|delta|^2 |h|^2``.
    * Adam and AdaMuon, ``dW = sign(delta) sign(h)^T``: ``|delta|_1 |h|_1``.
    * K-FAC, ``dW = B^-e_b delta h^T A^-e_a``: ``|delta|^(2 - 2 e_b) |h|^(2 - 2 e_a)``.
    * Shampoo, ``dW = L^-e/2 delta h^T R^-e/2``: ``(|delta|^2 |h|^2)^(1 - e)``, since both L and R
      have eigenvalues of the order ``|delta|^2 |h|^2``.
    * Shampoo with a graft has the magnitude, and so the row, of what is grafted.
    * Muon, ``dW = delta h^T / (|delta| |h|)``: ``|delta| |h|``, which is Shampoo's with ``e = 1/2``. SOAP
      is Adam in the basis of singular vectors, where ``delta h^T`` has one entry: the same.
    * Adafactor, ``dW = RMS(W) sign(delta) sign(h)^T``: Adam's, times the order of the weights.

    Args:
        geometry: Role of the parameter.
        optimizer: Family and powers.
        beta: Readout power of the parameterization.

    Returns:
        ``(power of m_in, power of m_out)``; the learning rate undoes the order above.
    """
    step = optimizer.step
    # |h|^(2 - 2 e_in) is m_in^(1 - e_in), and the rate undoes it.
    p_in = step.e_in - 1
    # |delta|^(2 - 2 e_out) is m_out^((1 - 2 beta)(1 - e_out)), and the rate undoes it.
    p_out = (1 - 2 * beta) * (step.e_out - 1)
    e_given = step.e_in if geometry.fan_in_axes else step.e_out
    p_given = 2 * (e_given - 1)
    if step.entrywise:  # |delta|_1 |h|_1 is |delta| |h| times sqrt(d_out d_in)
        p_in, p_out = p_in - 0.5, p_out - 0.5
    if step.relative:
        p_in, p_given = p_in + _weight_power(geometry, beta), p_given + 1
    return _plus((p_in, p_out), geometry, p_given)


def aligned_powers(geometry: Geometry, optimizer: OptimizerSpec, beta: float) -> Powers:
    """Powers of ``(m_in, m_out)`` in the largest stable rate of each layer: ``RMS(dW h) = Theta(1)``.

    Everett et al., arXiv 2407.05872, table 1, in the gauge without multipliers. An entry of ``dW h`` is a sum
    of ``m_in`` terms: of that order when they are aligned, of its root when they are not, of a power in
    between as measured. What one entry of
    ``dW`` is: ``m_out^-beta`` for SGD, 1 for Adam, ``RMS(W)`` for Adafactor. One thing more bounds SGD's
    readout: gradients of the layers below are made of its weights, which must not grow beyond their start.

    Args:
        geometry: Role of the parameter.
        optimizer: One with rates by alignment, and an alignment.
        beta: Readout power of the parameterization.
    """
    step = optimizer.step
    exponent = {"full": 1.0, "none": 0.5}.get(optimizer.alignment or "")
    if exponent is None:  # measured, at least of some
        exponent = dict(optimizer.exponents).get(geometry.name, 1.0)
    # Gradients below SGD's readout are made of its weights, which must not outgrow their start.
    if step.gradient_power and geometry.role == "output":
        exponent = max(exponent, beta)
    p_in, p_out = -exponent, beta * step.gradient_power
    # h stands once in dW h, and once more in SGD's gradient.
    p_given = -1 - step.gradient_power
    if step.relative:
        p_in, p_given = p_in + _weight_power(geometry, beta), p_given + 1
    return _plus((p_in, p_out), geometry, p_given)


def _weight_power(geometry: Geometry, beta: float) -> float:
    """Return the power of ``1/m_in`` in the weights."""
    return beta if geometry.role == "output" else 0.5
