"""Attention up to a key length: the definition, in the precision of its input, and cuDNN's call on CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_oracle as oracle

from jaxrepro.ops import attention
from jaxrepro.ops.attention import attend_joint, attend_prefix


@pytest.mark.parametrize(("dtype", "atol"), [("float64", 1e-12), ("float32", 1e-5)])
def test_keys_count_up_to_the_length_of_their_row(dtype, atol):
    q, k, v = oracle.draw(0, (3, 2, 2), b=3)
    q, lengths = q[:, :5], np.array([1, 7, 12])
    see = np.arange(12) < lengths[:, None, None]
    want = [oracle.softmax_attention(*row) for row in zip(q, k, v, np.repeat(see, 5, 1))]
    with oracle.float64():
        arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
        got = jax.jit(attend_prefix)(*arrays, jnp.asarray(lengths))
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)
        np.testing.assert_allclose(jax.jit(attend_prefix)(*arrays)[2], want[2], rtol=0, atol=atol)


def test_padded_text_gives_zeros_and_is_no_key():
    q, k, v = oracle.draw(1, (2, 2, 1), b=2, text=3, dtype="float32")
    k[:, 6:] = v[:, 6:] = 1e4
    text = jnp.asarray([2, 0])
    k[1, 4:] = v[1, 4:] = 1e4
    run = jax.jit(attend_joint, static_argnums=3)
    whole = run(*map(jnp.asarray, (q, k, v)), 4, text)
    for r, n in enumerate((6, 4)):
        see = np.broadcast_to(np.arange(7) < n, (7, 7))
        want = oracle.softmax_attention(q[r], k[r], v[r], see)
        np.testing.assert_allclose(whole[r, :n], want[:n], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(whole[r, n:], 0)
    last = run(*map(jnp.asarray, (q[:, 4:], k, v)), 4, text)  # text queries alone
    np.testing.assert_allclose(last, whole[:, 4:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [None, [5, 11]])
def test_on_cuda_it_lowers_to_cudnn_without_a_mask(lengths, monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)  # there is none on a CPU
    monkeypatch.setattr(attention, "_cudnn_takes", lambda q: True)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in oracle.draw(2, (3, 2, 2), b=2, i=8)]
    lengths = None if lengths is None else jnp.asarray(lengths)

    def loss(q, k, v):
        # odd lengths: jax refuses those of a gradient
        return attend_prefix(q[:, :5], k[:, 1:], v[:, 1:], lengths).sum(dtype=jnp.float32)

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "exponential" not in text  # the XLA branch is not there
    with_xla = jax.jit(jax.grad(loss)).trace(*arrays).lower(lowering_platforms=("cpu",)).as_text()
    assert "__cudnn" not in with_xla


def test_splash_attention_interpreted_is_the_definition_up_to_the_length():
    q, k, v = (
        jnp.asarray(x) for x in oracle.draw(3, (150, 1, 1), b=2, h=1, i=128, dtype="float32")
    )
    q = q[:, :40]
    for length in (None, jnp.asarray([150, 30])):
        got = attention._splash(q, k, v, length, interpret=True)
        np.testing.assert_allclose(got, attention._xla(q, k, v, length), rtol=0, atol=1e-5)


def test_on_a_tpu_it_lowers_to_splash_attention_and_so_does_its_gradient(monkeypatch):
    monkeypatch.setattr(attention, "_splash_takes", lambda q, k: True)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in oracle.draw(4, (150, 1, 1), h=1, i=128))
    loss = lambda q, k, v: attend_prefix(q, k, v, jnp.asarray([30])).sum(dtype=jnp.float32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_short_rows_and_other_devices_stay_with_xla(monkeypatch):
    x = lambda n, i: jax.ShapeDtypeStruct((1, n, 1, i), jnp.bfloat16)
    assert not attention._splash_takes(x(256, 128), x(256, 128))  # a CPU
    tpu = type("Device", (), {"platform": "tpu"})
    monkeypatch.setattr(jax, "local_devices", lambda: [tpu])
    assert attention._splash_takes(x(256, 128), x(256, 128))
    assert not attention._splash_takes(x(64, 128), x(256, 128))
    assert not attention._splash_takes(x(256, 64), x(256, 64))
