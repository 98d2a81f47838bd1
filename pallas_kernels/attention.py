import functools, math
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from pallas_kernels import portable, reference
def attention(q,k,v,*,scale=None,implementation="auto",mode="reverse",return_lse=False):
    scale = 1/math.sqrt(q.shape[-1]) if scale is None else float(scale)
    op = {"reverse":_reverse,"forward":_forward}[mode]
    out,lse=op(q,k,v,scale,{"auto":portable,"portable":portable,"reference":reference}[implementation])
    return (out,lse) if return_lse else out
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,4))
def _reverse(q,k,v,scale,back_end): return back_end.forward(q,k,v,scale=scale)
def _named(out,lse): return checkpoint_name(out,"attention_out"), checkpoint_name(lse,"attention_lse")
def _reverse_fwd(q,k,v,scale,back_end):
    out,lse=_named(*back_end.forward(q,k,v,scale=scale))
    return (out,lse),(q,k,v,out,lse)
def _reverse_bwd(scale,back_end,res,cts):
    return back_end.backward(*res,*cts,scale=scale)
_reverse.defvjp(_reverse_fwd,_reverse_bwd)
@functools.partial(jax.custom_jvp, nondiff_argnums=(3,4))
def _forward(q,k,v,scale,back_end): return back_end.forward(q,k,v,scale=scale)
@functools.partial(_forward.defjvp, symbolic_zeros=True)
def _forward_jvp(scale,back_end,primals,tangents):
    tangents=tuple(None if isinstance(t,SymbolicZero) else t for t in tangents)
    out,lse,t_out,t_lse=_fused(primals,tangents,scale,back_end)
    return (out,lse),(t_out,t_lse)
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,3))
def _fused(p,t,scale,back_end): return back_end.forward_with_tangent(*p,*t,scale=scale)
def _fused_fwd(p,t,scale,back_end):
    out,lse,t_out,t_lse=_fused(p,t,scale,back_end)
    out,lse=_named(out,lse)
    return (out,lse,t_out,t_lse),(*p,out,lse)
def _fused_bwd(scale,back_end,res,cts):
    dout,dlse,dt_out,dt_lse=cts
    dq,dk,dv=back_end.backward(*res,dout,dlse,scale=scale)
    dq=jnp.where(dt_out!=0,jnp.nan,dq)
    return (dq,dk,dv),None
_fused.defvjp(_fused_fwd,_fused_bwd)
def attention_given(q,k,v,out,lse): pass
