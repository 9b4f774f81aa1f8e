//! The GPU's kernels without a GPU: the committed PTX runs in the interpreter, every access checked, and every bit is held
//! against the scalar oracle; then faults are planted in the PTX, and each must be caught.
mod case;
mod device;
mod measures;
mod planted;
mod steps;
mod tables;
