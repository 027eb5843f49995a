"""Factorisations, equations, functions of matrices, and Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
import torch
from jax import Array, lax

from bridge.dtypes import as_jax_dtype
from bridge.ops.pointwise import with_slope_of
from bridge.ops.registry import Operation, lowers

aten = torch.ops.aten


def _info(operation: Operation, position: int) -> Array:
    """An error code of an output: none. A singular matrix gives infinities or NaN instead of an error."""
    output = operation.result[position]
    return jnp.zeros(output.shape, as_jax_dtype(output.dtype))


def _transposed(matrix: Array) -> Array:
    return jnp.swapaxes(matrix, -1, -2)


def _adjoint(matrix: Array) -> Array:
    return jnp.conj(_transposed(matrix))


# Functions of a matrix.


@lowers(aten.linalg_matrix_exp.default)
def _matrix_exp(operation: Operation, matrix: Array) -> Array:
    if matrix.size == 0:
        return matrix
    exponential: Array = jax.scipy.linalg.expm(matrix)
    return exponential


@lowers(aten.linalg_inv_ex.default)
def _inverse(operation: Operation, matrix: Array, *, check_errors: bool = False) -> tuple[Array, Array]:
    return jnp.linalg.inv(matrix), _info(operation, 1)


@lowers(aten.linalg_pinv.atol_rtol_tensor, aten.linalg_pinv.default)
def _pseudo_inverse(
    operation: Operation,
    matrix: Array,
    *args: Any,
    atol: Array | None = None,
    rtol: Array | None = None,
    hermitian: bool = False,
) -> Array:
    if matrix.size == 0:
        return jnp.zeros(operation.shape, matrix.dtype)
    if hermitian:
        matrix = with_slope_of(_hermitian(matrix, lower=True), matrix)
    largest = jnp.max(jnp.linalg.svd(lax.stop_gradient(matrix), compute_uv=False), axis=-1)
    if rtol is None:
        default = max(matrix.shape[-2:]) * np.finfo(matrix.dtype).eps
        rtol = jnp.asarray(default) if atol is None else jnp.where(atol > 0, 0.0, default)
    cutoff = rtol * largest if atol is None else jnp.maximum(atol, rtol * largest)
    return jnp.linalg.pinv(matrix, rtol=jnp.where(largest > 0, cutoff / jnp.where(largest > 0, largest, 1), 0))


def _lu(matrix: Array) -> tuple[Array, Array, Array]:
    """Packed factors, pivots that count from one, and the permutation."""
    factors, pivots, permutation = lax.linalg.lu(matrix)
    return factors, pivots + 1, permutation


@lowers(aten._linalg_det.default)
def _determinant(operation: Operation, matrix: Array) -> tuple[Array, Array, Array]:
    factors, pivots, _ = _lu(lax.stop_gradient(matrix))
    determinant = jnp.linalg.det(matrix) if matrix.size else jnp.ones(operation.shape, matrix.dtype)
    return determinant, factors, pivots


@lowers(aten._linalg_slogdet.default)
def _log_determinant(operation: Operation, matrix: Array) -> tuple[Array, Array, Array, Array]:
    sign, logarithm = jnp.linalg.slogdet(matrix)
    factors, pivots, _ = _lu(lax.stop_gradient(matrix))
    return sign, logarithm, factors, pivots


# Factorisations.


def _hermitian(matrix: Array, *, lower: bool) -> Array:
    """The matrix of which only one triangle is looked at; the gradient goes to both, as PyTorch has it."""
    half = jnp.tril(matrix, -1) if lower else jnp.triu(matrix, 1)
    diagonal = jnp.real(jnp.diagonal(matrix, axis1=-2, axis2=-1))
    whole = half + _adjoint(half) + diagonal[..., None] * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    return with_slope_of(whole, (matrix + _adjoint(matrix)) / 2)


@lowers(aten.linalg_cholesky_ex.default)
def _cholesky_with_info(
    operation: Operation, matrix: Array, *, upper: bool = False, check_errors: bool = False
) -> tuple[Array, Array]:
    return _cholesky(operation, matrix, upper), _info(operation, 1)


@lowers(aten.cholesky.default)
def _cholesky(operation: Operation, matrix: Array, upper: bool = False) -> Array:
    factor = lax.linalg.cholesky(_hermitian(matrix, lower=not upper), symmetrize_input=False)
    return _adjoint(factor) if upper else factor


@lowers(aten.linalg_qr.default)
def _qr(operation: Operation, matrix: Array, mode: str = "reduced") -> tuple[Array, Array]:
    if mode == "r":
        return jnp.zeros((0,), matrix.dtype), jnp.linalg.qr(matrix, mode="r")
    orthogonal, triangular = jnp.linalg.qr(matrix, mode=mode)
    return orthogonal, triangular


@lowers(aten._linalg_svd.default)
def _svd(
    operation: Operation, matrix: Array, full_matrices: bool = False, compute_uv: bool = True, *, driver: Any = None
) -> tuple[Array, Array, Array]:
    if not compute_uv:
        values = jnp.linalg.svd(matrix, compute_uv=False)
        empty = [jnp.zeros(operation.result[position].shape, matrix.dtype) for position in (0, 2)]
        return empty[0], values, empty[1]
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    if full_matrices and matrix.shape[-1] != matrix.shape[-2]:
        # What completes the bases has no derivative.
        whole = jnp.linalg.svd(lax.stop_gradient(matrix), full_matrices=True)
        count = values.shape[-1]
        left = jnp.concatenate([left, whole[0][..., :, count:]], axis=-1)
        right = jnp.concatenate([right, whole[2][..., count:, :]], axis=-2)
    return left, values, right


@lowers(aten._linalg_eigh.default)
def _eigh(operation: Operation, matrix: Array, UPLO: str = "L", compute_v: bool = True) -> tuple[Array, Array]:
    whole = _hermitian(matrix, lower=UPLO.upper() == "L")
    values, vectors = jnp.linalg.eigh(whole, symmetrize_input=False)
    return values, vectors if compute_v else jnp.zeros(operation.result[1].shape, matrix.dtype)


@lowers(aten.linalg_lu_factor_ex.default)
def _lu_factor(
    operation: Operation, matrix: Array, *, pivot: bool = True, check_errors: bool = False
) -> tuple[Array, Array, Array]:
    factors, pivots, _ = _lu(matrix)
    return factors, pivots, _info(operation, 2)


def _unpacked(operation: Operation, factors: Array, permutation: Array) -> tuple[Array, Array, Array]:
    rows, columns = factors.shape[-2:]
    lower = jnp.tril(factors, -1)[..., :, : min(rows, columns)] + jnp.eye(rows, min(rows, columns), dtype=factors.dtype)
    order = jnp.swapaxes(jax.nn.one_hot(permutation, rows, dtype=factors.dtype), -1, -2)
    return order, lower, jnp.triu(factors)[..., : min(rows, columns), :]


@lowers(aten.linalg_lu.default)
def _lu_matrices(operation: Operation, matrix: Array, *, pivot: bool = True) -> tuple[Array, Array, Array]:
    factors, _, permutation = _lu(matrix)
    return _unpacked(operation, factors, permutation)


@lowers(aten.lu_unpack.default)
def _lu_unpack(
    operation: Operation, factors: Array, pivots: Array, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Array, ...]:
    permutation = lax.linalg.lu_pivots_to_permutation(pivots - 1, factors.shape[-2])
    parts = _unpacked(operation, factors, permutation)
    wanted = (unpack_pivots, unpack_data, unpack_data)
    return tuple(
        part if is_wanted else jnp.zeros(output.shape, factors.dtype)
        for part, is_wanted, output in zip(parts, wanted, operation.result, strict=True)
    )


@lowers(aten.linalg_lu_solve.default)
def _lu_solve(
    operation: Operation, factors: Array, pivots: Array, right: Array, *, left: bool = True, adjoint: bool = False
) -> Array:
    permutation = lax.linalg.lu_pivots_to_permutation(pivots - 1, factors.shape[-2])
    order, lower, upper = _unpacked(operation, factors, permutation)
    matrix = jnp.matmul(order, jnp.matmul(lower, upper))
    matrix = _adjoint(matrix) if adjoint else matrix
    solution: Array = jnp.linalg.solve(matrix, right) if left else _solve_from_right(matrix, right)
    return solution


@lowers(aten.linalg_householder_product.default)
def _householder_product(operation: Operation, reflectors: Array, scales: Array) -> Array:
    """``H_1 H_2 ...`` applied to the leading columns of the identity, last reflector first."""
    rows, columns = reflectors.shape[-2:]
    product = jnp.broadcast_to(jnp.eye(rows, columns, dtype=reflectors.dtype), reflectors.shape)
    for position in reversed(range(scales.shape[-1])):
        reflector = reflectors[..., :, position]
        below = jnp.arange(rows) > position
        reflector = jnp.where(below, reflector, jnp.arange(rows) == position)
        projected = jnp.einsum("...i,...ij->...j", jnp.conj(reflector), product)
        scale = scales[..., position, None, None]
        product = product - scale * reflector[..., :, None] * projected[..., None, :]
    return product


# Equations.


def _solve_from_right(matrix: Array, right: Array) -> Array:
    return _transposed(jnp.linalg.solve(_transposed(matrix), _transposed(right)))


@lowers(aten._linalg_solve_ex.default)
def _solve(
    operation: Operation, matrix: Array, right: Array, *, left: bool = True, check_errors: bool = False
) -> tuple[Array, Array, Array, Array]:
    is_vector = right.ndim == 1 or (matrix.ndim - 1 == right.ndim and right.shape == matrix.shape[:-1])
    wanted = right[..., None] if is_vector else right
    solution = jnp.linalg.solve(matrix, wanted) if left else _solve_from_right(matrix, wanted)
    factors, pivots, _ = _lu(lax.stop_gradient(matrix))
    return (solution[..., 0] if is_vector else solution), factors, pivots, _info(operation, 3)


@lowers(aten.linalg_solve_triangular.default)
def _solve_triangular(
    operation: Operation, matrix: Array, right: Array, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Array:
    batch = operation.shape[:-2]
    matrix = jnp.broadcast_to(matrix, (*batch, *matrix.shape[-2:]))
    right = jnp.broadcast_to(right, operation.shape)
    return lax.linalg.triangular_solve(matrix, right, left_side=left, lower=not upper, unit_diagonal=unitriangular)


@lowers(aten.triangular_solve.default)
def _old_solve_triangular(
    operation: Operation,
    right: Array,
    matrix: Array,
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
) -> tuple[Array, Array]:
    batch = operation.shape[:-2]
    matrix = jnp.broadcast_to(matrix, (*batch, *matrix.shape[-2:]))
    right = jnp.broadcast_to(right, operation.shape)
    solution = lax.linalg.triangular_solve(
        matrix, right, left_side=True, lower=not upper, transpose_a=transpose, unit_diagonal=unitriangular
    )
    return solution, matrix


@lowers(aten.cholesky_solve.default)
def _cholesky_solve(operation: Operation, right: Array, factor: Array, upper: bool = False) -> Array:
    batch = operation.shape[:-2]
    factor = jnp.broadcast_to(factor, (*batch, *factor.shape[-2:]))
    lower = _adjoint(factor) if upper else factor
    fixed = lax.stop_gradient(jnp.tril(lower))

    def solution(right: Array) -> Array:
        half = lax.linalg.triangular_solve(fixed, right, left_side=True, lower=True)
        return lax.linalg.triangular_solve(
            fixed, half, left_side=True, lower=True, transpose_a=True, conjugate_a=jnp.iscomplexobj(fixed)
        )

    right = jnp.broadcast_to(right, operation.shape)
    solved = lax.stop_gradient(solution(right))
    # PyTorch differentiates the product of a whole matrix with itself, not of one triangle of it.
    product = jnp.matmul(lower, _adjoint(fixed)) + jnp.matmul(fixed, _adjoint(lower))
    return with_slope_of(solved, solution(right - jnp.matmul(product, solved)))


@lowers(aten.cholesky_inverse.default)
def _cholesky_inverse(operation: Operation, factor: Array, upper: bool = False) -> Array:
    identity = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return _cholesky_solve(operation, identity, factor, upper)


@lowers(aten.linalg_lstsq.default)
def _least_squares(
    operation: Operation, matrix: Array, right: Array, rcond: float | None = None, *, driver: str | None = None
) -> tuple[Array, ...]:
    is_vector = right.ndim == 1 or (matrix.ndim - 1 == right.ndim and right.shape == matrix.shape[:-1])
    wanted = right[..., None] if is_vector else right
    solution = jnp.matmul(jnp.linalg.pinv(matrix), wanted)
    rows, columns = matrix.shape[-2:]
    residuals = jnp.zeros(operation.result[1].shape, matrix.dtype)
    if operation.result[1].numel():
        residuals = jnp.sum(jnp.abs(jnp.matmul(matrix, solution) - wanted) ** 2, axis=-2).reshape(residuals.shape)
    rank = jnp.full(operation.result[2].shape, min(rows, columns), jnp.int64)
    values = jnp.zeros(operation.result[3].shape, matrix.real.dtype)
    return (solution[..., 0] if is_vector else solution), residuals, rank, values


@lowers(aten.linalg_cross.default)
def _cross(operation: Operation, left: Array, right: Array, *, dim: int = -1) -> Array:
    left, right = jnp.broadcast_arrays(left, right)
    return jnp.cross(left, right, axis=dim)


# Fourier transforms. PyTorch names the scaling by a number: none, by the root of the size, by the size.


def _scale(normalization: int, sizes: Sequence[int]) -> float:
    return {0: 1.0, 1: 1 / math.sqrt(math.prod(sizes)), 2: 1 / math.prod(sizes)}[normalization]


@lowers(aten._fft_r2c.default)
def _fft_r2c(operation: Operation, value: Array, dim: Sequence[int], normalization: int, onesided: bool) -> Array:
    transform = jnp.fft.rfftn if onesided else jnp.fft.fftn
    return transform(value, axes=tuple(dim)) * _scale(normalization, [value.shape[axis] for axis in dim])


@lowers(aten._fft_c2r.default)
def _fft_c2r(operation: Operation, value: Array, dim: Sequence[int], normalization: int, last_dim_size: int) -> Array:
    sizes = [*(value.shape[axis] for axis in dim[:-1]), last_dim_size]
    return jnp.fft.irfftn(value, s=sizes, axes=tuple(dim), norm="forward") * _scale(normalization, sizes)


@lowers(aten._fft_c2c.default)
def _fft_c2c(operation: Operation, value: Array, dim: Sequence[int], normalization: int, forward: bool) -> Array:
    if not dim:
        return value
    scale = _scale(normalization, [value.shape[axis] for axis in dim])
    if forward:
        return jnp.fft.fftn(value, axes=tuple(dim)) * scale
    return jnp.fft.ifftn(value, axes=tuple(dim), norm="forward") * scale
