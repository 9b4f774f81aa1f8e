//! Build script: hands the target to the binary, and checks that the committed PTX belongs to its sources. Nothing of CUDA,
//! RDMA or hwloc is needed to build.

use std::{fs, path::Path, process::exit};

use sha2::{Digest, Sha256};

/// What the PTX is made from, in the order in which scripts/kernels hashes it.
const SOURCES: [&str; 5] = ["flags", "device.h", "table.h", "rules.h", "gradwire.cu"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rustc-env=GRADWIRE_TARGET={}", std::env::var("TARGET").unwrap_or_default());
    if let Err(what) = check_kernels(Path::new("kernels")) {
        eprintln!("kernels/gradwire.ptx: {what}: run scripts/kernels, which compiles kernels/ (it needs clang-19)");
        exit(1);
    }
}

fn check_kernels(folder: &Path) -> Result<(), String> {
    let read = |name: &str| {
        fs::read_to_string(folder.join(name)).map_err(|error| format!("kernels/{name} cannot be read ({error})"))
    };
    let ptx = read("gradwire.ptx")?;
    let mut source = Sha256::new();
    for name in SOURCES {
        source.update(read(name)?);
    }
    let (source_hash, _) = after(&ptx, "// source sha256: ")?;
    if source_hash != hex(source) {
        return Err("it was made from other sources or flags than those beside it".into());
    }
    let (body_hash, body) = after(&ptx, "// body sha256: ")?;
    if body_hash != hex(Sha256::new().chain_update(body)) {
        return Err("it was changed after it was made".into());
    }
    Ok(())
}

/// What follows `mark` on its line, and all lines after that.
fn after<'a>(text: &'a str, mark: &str) -> Result<(&'a str, &'a str), String> {
    let rest = text.split_once(mark).ok_or_else(|| format!("its header has no `{}`", mark.trim()))?.1;
    rest.split_once('\n').ok_or_else(|| "it ends in its header".to_owned())
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
