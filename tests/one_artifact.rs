//! One artifact: the binary starts on a machine that has nothing but the C library, so it may need nothing else.
//!
//! Invariant: what it finds at run time (libhwloc, libibverbs, libcuda) is opened by name when wanted, never needed by the
//! loader.

use std::{fs, path::Path};

/// What every Linux with glibc has; the last is the loader, under the names of several machines.
const ALLOWED: [&str; 7] = ["libc.so", "libm.so", "libgcc_s.so", "libpthread.so", "libdl.so", "librt.so", "ld-linux"];

/// The libraries that the loader would look for (DT_NEEDED), read from the file itself so that no tool has to be there.
fn needed(path: &Path) -> Vec<String> {
    const PROGRAM_HEADER_LOAD: u64 = 1;
    const PROGRAM_HEADER_DYNAMIC: u64 = 2;
    const DYNAMIC_NEEDED: u64 = 1;
    const DYNAMIC_STRING_TABLE: u64 = 5;
    let file = fs::read(path).unwrap();
    let number = |at: usize, bytes: usize| -> u64 {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&file[at..at + bytes]);
        u64::from_le_bytes(word)
    };
    assert_eq!(&file[..6], b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file");
    let (table, entry_bytes, entries) = (number(32, 8) as usize, number(54, 2) as usize, number(56, 2) as usize);
    // Of each program header: type, offset in the file, address in memory, length in the file.
    let headers: Vec<[u64; 4]> = (0..entries)
        .map(|index| table + index * entry_bytes)
        .map(|at| [number(at, 4), number(at + 8, 8), number(at + 16, 8), number(at + 32, 8)])
        .collect();
    let Some(dynamic) = headers.iter().find(|header| header[0] == PROGRAM_HEADER_DYNAMIC) else {
        return Vec::new();
    };
    let tags: Vec<(u64, u64)> = (0..dynamic[3] as usize / 16)
        .map(|index| dynamic[1] as usize + index * 16)
        .map(|at| (number(at, 8), number(at + 8, 8)))
        .take_while(|&(tag, _)| tag != 0)
        .collect();
    let strings_address = tags.iter().find(|tag| tag.0 == DYNAMIC_STRING_TABLE).unwrap().1;
    let segment = headers.iter().find(|header| {
        header[0] == PROGRAM_HEADER_LOAD && (header[2]..header[2] + header[3]).contains(&strings_address)
    });
    let [_, offset, address, _] = segment.unwrap();
    let strings = (strings_address - address + offset) as usize;
    let name = |at: u64| {
        let text = &file[strings + at as usize..];
        String::from_utf8(text[..text.iter().position(|&byte| byte == 0).unwrap()].to_vec()).unwrap()
    };
    tags.iter().filter(|tag| tag.0 == DYNAMIC_NEEDED).map(|tag| name(tag.1)).collect()
}

fn beyond_the_c_library(libraries: &[String]) -> Vec<&String> {
    libraries.iter().filter(|name| !ALLOWED.iter().any(|allowed| name.starts_with(allowed))).collect()
}

#[test]
fn the_binary_needs_nothing_but_the_c_library() {
    let libraries = needed(Path::new(env!("CARGO_BIN_EXE_gradwire")));
    if cfg!(target_env = "gnu") {
        assert!(libraries.iter().any(|name| name.starts_with("libc.so")), "misread: {libraries:?}");
    }
    assert_eq!(beyond_the_c_library(&libraries), Vec::<&String>::new(), "of {libraries:?}");
}

/// What `gradwire info` says of GPUs with this driver library.
fn gpus(library: &Path) -> serde_json::Value {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_gradwire"));
    let output = command.args(["info", "--json"]).env("GRADWIRE_CUDA_LIBRARY", library).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    info["gpus"].clone()
}

#[test]
fn the_binary_starts_without_a_cuda_driver_and_finds_one_that_is_named() {
    let why = gpus(Path::new("/nowhere/libcuda.so.1"));
    assert!(why["why"].as_str().unwrap().contains("/nowhere/libcuda.so.1 cannot be loaded"), "{why}");
    let soft = std::env::current_exe().unwrap().with_file_name("libgradwire_softcuda.so");
    let found = gpus(&soft);
    let device = &found["devices"][0];
    assert_eq!((&found["cuda"], &device["name"]), (&"12.9".into(), &"gradwire soft CUDA".into()), "{found}");
    assert_eq!((&device["memory_bytes"], &device["capability"]), (&(1u64 << 30).into(), &"7.0".into()));
}

#[test]
fn a_library_too_many_is_noticed() {
    let libraries = ["libc.so.6", "libhwloc.so.15", "libudev.so.1", "ld-linux-x86-64.so.2", "libcuda.so.1"];
    let libraries = libraries.map(String::from);
    assert_eq!(beyond_the_c_library(&libraries), ["libhwloc.so.15", "libudev.so.1", "libcuda.so.1"]);
}
