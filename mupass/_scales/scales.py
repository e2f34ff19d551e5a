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
from mupass._scales.optimizers import ENTRYWISE, OptimizerSpec
from mupass._scales.parameterizations import row


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
    lr_powers: tuple[float, float]


SCALES = tuple(f.name for f in fields(Scales) if f.name != "lr_powers")


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
    m_in, m_out = geometry.m_in, geometry.m_out
    table = powers(geometry, optimizer, parameterization)
    factors = {name: m_in**p_in * m_out**p_out for name, (p_in, p_out) in table.items()}
    for name, power in depth_powers(optimizer, parameterization).items():
        factors[name] *= geometry.depth**power
    for name, (p_out, p_in) in folded_powers(optimizer).items():
        factors[name] *= geometry.folded**p_out * geometry.folded_in**p_in
    for name, power in length_powers(optimizer, parameterization).items():
        factors[name] *= geometry.m_direction**power
    return Scales(**factors, lr_powers=table["lr"])


def powers(
    geometry: Geometry, optimizer: OptimizerSpec, parameterization: str = "mup"
) -> dict[str, tuple[float, float]]:
    """Powers of ``(m_in, m_out)`` in each scale of one parameter.

    Args:
        geometry: Role and uses of the parameter.
        optimizer: Family and powers.
        parameterization: Key of `PARAMETERIZATIONS`.

    Returns:
        Scale name (a field of `Scales`) -> ``(power of m_in, power of m_out)``.
    """
    none = (0.0, 0.0)
    beta = row(parameterization).readout_power
    if beta is None:
        table = {scale: none for scale in SCALES}
        if optimizer.alignment:  # one rate for each layer, on the user's 1/sqrt(fan_in)
            table["lr"] = aligned_powers(geometry, optimizer, 0.5)
            table["epsilon"] = epsilon_powers(optimizer, 0.5)
        return table
    if geometry.length and geometry.role == "output":  # g/|v| multiplies what v gives: see `length_powers`
        geometry = replace(geometry, given=geometry.given - (beta - 0.5))
    h2, delta2 = (1.0, 0.0), (0.0, 1 - 2 * beta)  # orders of |h|^2 and |delta|^2
    if geometry.fan_in_axes:
        h2 = _plus(h2, geometry, 2)
    else:  # what a gain multiplies is part of its B
        delta2 = _plus(delta2, geometry, 2)
    damping_in, damping_out = {
        "kfac": (h2, delta2),
        "foof": (h2, delta2),
        # R = G^T G and L = G G^T share their non-zero eigenvalues, |delta|^2 |h|^2
        "shampoo": ((h2[0], h2[1] + delta2[1]),) * 2,
    }.get(optimizer.name, (none, none))
    return {
        "init": _plus((-_weight_power(geometry, beta), 0.0), geometry, -1),
        # A tied embedding has entries of Theta(1) where a readout has 1/m**beta; m is its kept axis.
        "multiplier": (0.0, -beta - geometry.given) if geometry.readout_uses else none,
        "lr": aligned_powers(geometry, optimizer, beta)
        if optimizer.alignment
        else lr_powers(geometry, optimizer, beta),
        "damping_in": damping_in,
        "damping_out": damping_out,
        "epsilon": _plus(epsilon_powers(optimizer, beta), geometry, 0 if optimizer.name == "adamuon" else 1),
        "weight_decay": none,  # Qiu et al., arXiv 2512.05620: independent decay is Theta(1)
    }


def _plus(powers: tuple[float, float], geometry: Geometry, times: float) -> tuple[float, float]:
    """Add multiples of the power that the code gives what the parameter is multiplied with."""
    more = 0.0 if geometry.readout_uses else geometry.given * times  # there the multiplier undoes it
    p_in, p_out = powers
    return (p_in + more, p_out) if geometry.fan_in_axes else (p_in, p_out + more)


def length_powers(optimizer: OptimizerSpec, parameterization: str = "mup") -> dict[str, float]:
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
    total = {"sgd": 0.0, "kfac": optimizer.e_b, "foof": optimizer.e_b, "shampoo": optimizer.e}
    e = total.get(optimizer.name, 0.5)
    return {"init": -order, "lr": 2 * order * (e - 1), "epsilon": order}


def depth_powers(optimizer: OptimizerSpec, parameterization: str = "mup") -> dict[str, float]:
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
    name = optimizer.name
    if name == "shampoo":
        e = {"none": optimizer.e, "sgd": 0.0}.get(optimizer.graft, 0.5)
        return {"lr": 1 - 2 * e, "damping_in": -2.0, "damping_out": -2.0, "epsilon": -1.0}
    if name in {"kfac", "foof"}:
        return {"lr": 1 - 2 * optimizer.e_b, "damping_out": -2.0}
    return {"lr": 1.0} if name == "sgd" else {"epsilon": 0.0 if name == "adamuon" else -1.0}


def folded_powers(optimizer: OptimizerSpec) -> dict[str, tuple[float, float]]:
    """Powers of a factor that `mupass.fold` put into a parameter, in its scales: training goes on as before.

    ``W' = c W`` in the place of a multiplier ``c`` behind ``W`` must change by ``c dW``, from gradients
    ``G' = G/c``, ``delta' = delta/c``. With e the total power on ``delta`` the rate
    goes like ``c^(2 - 2 e)``. Where ``W'`` undoes ``c`` in front of it, the same holds
    with ``h`` in the place of ``delta``.

    Args:
        optimizer: Family and powers.

    Returns:
        Scale -> powers of the factor behind the parameter, and of the one that undoes another in front of it.
    """
    name = optimizer.name
    if name in {"kfac", "foof"}:
        return {
            "lr": (2 - 2 * optimizer.e_b, 2 - 2 * optimizer.e_a),
            "damping_in": (0.0, -2.0),
            "damping_out": (-2.0, 0.0),
        }
    if name == "shampoo":
        e = {"none": optimizer.e, "sgd": 0.0}.get(optimizer.graft, 0.5)
        both = {"damping_in": (-2.0, -2.0), "damping_out": (-2.0, -2.0), "epsilon": (-1.0, -1.0)}
        return {"lr": (2 - 2 * e, 2 - 2 * e), **both}
    if name == "sgd":
        return {"lr": (2.0, 2.0)}
    lr = 0.0 if name == "adafactor" else 1.0  # Adafactor's steps are relative to the weights
    epsilon = 0.0 if name == "adamuon" else -1.0
    return {"lr": (lr, lr), "epsilon": (epsilon, epsilon)}


def lr_powers(geometry: Geometry, optimizer: OptimizerSpec, beta: float) -> tuple[float, float]:
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
    grafted = optimizer.name == "shampoo" and optimizer.graft != "none"
    name = optimizer.graft if grafted else optimizer.name
    if name in {*ENTRYWISE, "rmsprop"}:
        return _plus((-1.0, beta - 1), geometry, -1)
    if name == "adafactor":
        return (_weight_power(geometry, beta) - 1, beta - 1)
    e_in, e_out = {
        "sgd": (0.0, 0.0),
        "shampoo": (optimizer.e, optimizer.e),
        "soap": (0.5, 0.5),
        "muon": (0.5, 0.5),
        "spectral": (0.5, 0.5),
    }.get(name, (optimizer.e_a, optimizer.e_b))
    return _plus(
        (e_in - 1, (1 - 2 * beta) * (e_out - 1)),
        geometry,
        2 * ((e_in if geometry.fan_in_axes else e_out) - 1),
    )


def aligned_powers(geometry: Geometry, optimizer: OptimizerSpec, beta: float) -> tuple[float, float]:
    """Powers of ``(m_in, m_out)`` in the largest stable rate of each layer: ``RMS(dW h) = Theta(1)``.

    Everett et al., arXiv 2407.05872, table 1, in the gauge without multipliers. An entry of ``dW h`` is a sum
    of ``m_in`` terms: of that order when they are aligned, of its root when they are not, of a power in
    between as measured. What one entry of
    ``dW`` is: ``m_out^-beta`` for SGD, 1 for Adam, ``RMS(W)`` for Adafactor. One thing more bounds SGD's
    readout: gradients of the layers below are made of its weights, which must not grow beyond their start.

    Args:
        geometry: Role of the parameter.
        optimizer: One of `ALIGNED` with an alignment.
        beta: Readout power of the parameterization.
    """
    terms = {"full": 1.0, "none": 0.5}.get(optimizer.alignment or "")
    if terms is None:  # measured, at least of some
        terms = dict(optimizer.exponents).get(geometry.name, 1.0)
    if optimizer.name == "sgd":
        bound = -max(terms, beta) if geometry.role == "output" else -terms
        return _plus((bound, beta), geometry, -2)
    if optimizer.name == "adafactor":
        return (_weight_power(geometry, beta) - terms, 0.0)
    return _plus((-terms, 0.0), geometry, -1)


def _weight_power(geometry: Geometry, beta: float) -> float:
    """Return the power of ``1/m_in`` in the weights."""
    return beta if geometry.role == "output" else 0.5


def epsilon_powers(optimizer: OptimizerSpec, beta: float) -> tuple[float, float]:
    """Powers of ``(m_in, m_out)`` in epsilon, which follows what it is added to (arXiv 2512.05620).

    Args:
        optimizer: Family.
        beta: Readout power of the parameterization.

    Returns:
        Those of ``|delta| |h|`` for Muon (the norm it divides by) and SOAP (the entry of the rotated
        gradient), of ``1/sqrt(d_in d_out)`` for AdaMuon (an entry of the orthogonal matrix), else those of
        one entry of ``delta h^T``.
    """
    if optimizer.name in {"muon", "soap"}:
        return (0.5, 0.5 - beta)
    return (-0.5, -0.5) if optimizer.name == "adamuon" else (0.0, -beta)
