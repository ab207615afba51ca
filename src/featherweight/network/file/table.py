"""The operators that a file may name: those that capturing and our own steps give, written out by what they do.

How the table came about: the operators of every network in ``tests/problems.py``, before and after each step; of the
zoo (``benchmarks/zoo_models.py``: torchvision, timm, transformers); then, on purpose, the public forms of ``torch``,
``torch.Tensor``, ``torch.nn.functional``, ``torch.linalg``, ``torch.fft`` and ``torch.special`` as capturing writes
them. Public forms check what they are given; the private kernels below them do not, and stay out. ``test_file.py``
holds the table complete over the problems and over the files of earlier versions; ``make fuzz`` calls all of it.

A name stands for all its overloads that ``allowed.refusal`` lets through. Left out on purpose: what gives memory that
nobody wrote (``empty``), what trusts the numbers in its tensors (pooling at given fractions, LU factors, eigenvalues
alone, which end the process where a number is NaN), what loops as often as an argument says (``diff``,
``combinations``), and views without their checks (``as_strided``).
"""

from __future__ import annotations

#: number by number, of one or more tensors; each of them in place, too, where torch has that
POINTWISE = """
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh
    atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu
    clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div divide elu eq erf erfc erfinv exp exp2 expm1
    fix float_power floor floor_divide fmax fmin fmod frac frexp gcd ge gelu greater greater_equal gt hardshrink
    hardsigmoid hardswish hardtanh heaviside hypot i0 igamma igammac isclose isfinite isinf isnan isneginf isposinf
    isreal lcm ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2
    logical_and logical_not logical_or logical_xor logit lt maximum minimum mish mul multiply mvlgamma nan_to_num ne
    neg negative nextafter not_equal polygamma positive pow prelu rad2deg reciprocal relu relu6 remainder round rrelu
    rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square sub subtract tan tanh
    threshold true_divide trunc where xlogy __and__ __lshift__ __or__ __rshift__ __xor__ special_airy_ai
    special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_digamma special_entr special_erf
    special_erfc special_erfcx special_erfinv special_exp2 special_expit special_expm1 special_gammainc
    special_gammaincc special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr
    special_logit special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
    special_modified_bessel_k1 special_multigammaln special_ndtr special_ndtri special_polygamma special_psi
    special_round special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 special_sinc
    special_spherical_bessel_j0 special_xlog1py special_xlogy special_zeta"""

#: over an axis or all of them
REDUCTIONS = """
    all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum cumulative_trapezoid
    kthvalue log_softmax logcumsumexp logsumexp max mean median min mode msort nanmean nanmedian nanquantile nansum
    norm norm_except_dim prod quantile renorm softmax sort special_log_softmax special_logsumexp special_softmax std
    std_mean sum sum_to_size topk trace trapezoid trapz var var_mean"""

#: other axes, other places, other number types
SHAPES = """
    adjoint atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cartesian_prod cat
    channel_shuffle chunk clone column_stack concat concatenate conj conj_physical constant_pad_nd contiguous detach
    diag diag_embed diagflat diagonal diagonal_scatter dsplit dstack expand expand_as flatten flip fliplr flipud
    hsplit hstack im2col imag mH mT matrix_H meshgrid moveaxis movedim narrow numpy_T one_hot pad permute
    pixel_shuffle pixel_unshuffle ravel real repeat repeat_interleave reshape reshape_as resolve_conj resolve_neg roll
    rot90 row_stack select select_scatter slice slice_scatter split split_with_sizes squeeze stack swapaxes swapdims t
    tensor_split tile to transpose tril triu type_as unbind unflatten unfold unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze view view_as view_as_complex view_as_real vsplit vstack sym_numel sym_size
    sym_storage_offset sym_stride complex polar"""

#: by indices or by condition
PLACES = """
    argwhere bucketize embedding embedding_bag gather index index_add index_copy index_fill index_put index_reduce
    index_select isin item masked_fill masked_scatter masked_select nonzero nonzero_numpy nonzero_static scatter
    scatter_add scatter_reduce searchsorted take take_along_dim unique_consecutive"""

#: products, convolutions, windows, normalizations, recurrent layers
LAYERS = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d addbmm addmm addmv addr affine_grid_generator avg_pool1d avg_pool2d avg_pool3d baddbmm
    batch_norm bilinear bmm cdist chain_matmul conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d
    conv_transpose3d corrcoef cosine_similarity cov cross dist dot einsum glu grid_sampler group_norm gru gru_cell
    inner instance_norm kron layer_norm linear lstm lstm_cell matmul max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices mm mv outer ger pairwise_distance pdist rms_norm
    rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell scaled_dot_product_attention tensordot upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d vdot _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d"""

ALGEBRA = """
    cholesky cholesky_inverse cholesky_solve det inverse linalg_cholesky linalg_cholesky_ex linalg_cond linalg_cross
    linalg_det linalg_diagonal linalg_eig linalg_eigh linalg_eigvalsh linalg_inv linalg_inv_ex
    linalg_lu linalg_lu_factor linalg_matmul linalg_matrix_exp linalg_matrix_norm linalg_matrix_power
    linalg_matrix_rank linalg_multi_dot linalg_norm linalg_pinv linalg_qr linalg_slogdet linalg_solve
    linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorinv linalg_tensorsolve linalg_vander linalg_vecdot
    linalg_vector_norm logdet matrix_exp matrix_power pinverse qr slogdet svd triangular_solve fft_fft fft_fft2
    fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2 fft_ifftn fft_ifftshift
    fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn histc
    istft stft"""

LOSSES = """
    binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy_loss
    hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss nll_loss_nd poisson_nll_loss
    smooth_l1_loss soft_margin_loss triplet_margin_loss"""

#: new tensors, and drawn ones
MAKING = """
    alpha_dropout arange bartlett_window bernoulli blackman_window dropout eye feature_alpha_dropout feature_dropout
    full full_like hamming_window hann_window kaiser_window linspace logspace multinomial new_full new_ones new_zeros
    normal ones ones_like rand rand_like randint randint_like randn randn_like randperm scalar_tensor tril_indices
    triu_indices zeros zeros_like"""

#: what writes into its first argument and is no pointwise operator's other form; what capturing makes of it
WRITING = """
    addbmm_ addmm_ addmv_ addr_ alpha_dropout_ baddbmm_ bernoulli_ copy_ cumprod_ cumsum_ detach_ dropout_
    exponential_ feature_alpha_dropout_ feature_dropout_ fill_ index_add_ index_copy_ index_fill_ index_put_
    index_reduce_ log_normal_ masked_fill_ masked_scatter_ normal_ renorm_ scatter_ scatter_add_ scatter_reduce_ tril_
    triu_ uniform_ zero_ copy exponential fill log_normal uniform zero __iand__ __ilshift__ __ior__ __irshift__
    __ixor__"""

#: rounding to integers and back, as quantized networks are written
QUANTIZED = """
    choose_qparams choose_qparams_per_token choose_qparams_per_token_asymmetric choose_qparams_symmetric
    convert_element_type dequantize_per_channel dequantize_per_channel_group dequantize_per_tensor
    dequantize_per_token quantize_per_channel quantize_per_channel_group quantize_per_tensor quantize_per_token"""

_ATEN = " ".join((POINTWISE, REDUCTIONS, SHAPES, PLACES, LAYERS, ALGEBRA, LOSSES, MAKING, WRITING)).split()
#: as torch's dispatcher spells them: "aten::conv2d"
PACKETS = frozenset({f"aten::{name}" for name in _ATEN} | {f"aten::{name}_" for name in POINTWISE.split()}
                    | {f"quantized_decomposed::{name}" for name in QUANTIZED.split()})

#: overloads of these that trust numbers in their tensors: the batch sizes of a packed sequence
TRUSTING = frozenset({"aten.lstm.data", "aten.gru.data", "aten.rnn_tanh.data", "aten.rnn_relu.data"})

__all__ = ["PACKETS", "TRUSTING"]
