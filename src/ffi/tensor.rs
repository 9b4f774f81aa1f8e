//! Tensors as C describes them.
//!
//! Invariant: a number that C gives for an enumeration is checked before it is one.

use std::ffi::c_char;

use super::status::{Answer, Fault, slice, text};
use crate::{
    layout::{Init, TensorSpec},
    types::Dtype,
};

/// The number format of the caller's gradients and parameters. What travels is chosen by the job's own settings.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::enum_variant_names)] // C has no namespaces
pub enum DataType {
    /// IEEE 754 binary32: float.
    GwF32 = 0,
    /// bfloat16, 2 bytes.
    GwBf16 = 1,
    /// IEEE 754 binary16, 2 bytes.
    GwF16 = 2,
}

/// How the servers fill a tensor before the first step; the same bits for any number of servers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::enum_variant_names)] // C has no namespaces
pub enum InitRule {
    /// All zeros.
    GwInitZeros = 0,
    /// All init_value.
    GwInitConstant = 1,
    /// Normal with mean 0 and standard deviation init_value.
    GwInitNormal = 2,
    /// Uniform on ±sqrt(6 / (fan_in + fan_out)); two dimensions or more.
    GwInitXavierUniform = 3,
    /// Normal with standard deviation sqrt(2 / fan_in); two dimensions or more.
    GwInitKaimingNormal = 4,
}

/// A tensor. All workers give a tensor of one name the same shape, rule and group; the number format is each one's own.
/// Set what is not used to zero.
#[repr(C)]
#[derive(Debug)]
pub struct TensorDescription {
    /// Its name, unique within the model: UTF-8 that ends with a NUL.
    pub name: *const c_char,
    /// Elements along each dimension; may be null for a scalar.
    pub shape: *const u64,
    /// How many dimensions; 0 for a scalar.
    pub dimensions: usize,
    /// A gw_dtype.
    pub dtype: u32,
    /// A gw_init.
    pub init: u32,
    /// What GW_INIT_CONSTANT and GW_INIT_NORMAL need.
    pub init_value: f32,
    /// The parameter group: 0 is the default one, i the i-th of the optimizer's groups.
    pub group: u16,
}

impl TensorDescription {
    /// The same in Rust's words.
    ///
    /// # Safety
    ///
    /// `name` and `shape` are null or what the fields' descriptions say.
    pub(super) unsafe fn to_spec(&self, index: usize) -> Answer<(TensorSpec, Dtype)> {
        // SAFETY: the caller of this function answers for it.
        let name = unsafe { text(self.name, &format!("the name of tensor {index}")) }?;
        // SAFETY: likewise.
        let shape = unsafe { slice(self.shape, self.dimensions, &format!("the shape of `{name}`")) }?;
        let init = match self.init {
            0 => Init::Zeros,
            1 => Init::Constant(self.init_value),
            2 => Init::Normal(self.init_value),
            3 => Init::XavierUniform,
            4 => Init::KaimingNormal,
            other => return Err(Fault::invalid(format!("the init of `{name}` is {other}, which is no gw_init"))),
        };
        let dtype = match self.dtype {
            0 => Dtype::F32,
            1 => Dtype::Bf16,
            2 => Dtype::F16,
            other => return Err(Fault::invalid(format!("the dtype of `{name}` is {other}, which is no gw_dtype"))),
        };
        let lengths: Vec<usize> = shape.iter().map(|length| *length as usize).collect();
        init.check(name, &lengths)?;
        Ok((TensorSpec::new(name, shape).init(init).group(self.group), dtype))
    }
}
