//! `include/gradwire.h` is what cbindgen makes of src/ffi, and every function in there is behind the panic boundary.
//!
//! `GRADWIRE_BLESS=1 cargo test --test c_header` writes the header anew.
//!
//! Invariant: the sources are read as they are; no list of functions is kept here.

use std::{collections::BTreeMap, fs, path::Path};

const HEADER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/include/gradwire.h");
const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/ffi");

const PREAMBLE: &str = "\
/* gradwire: a parameter server. Servers hold a model's parameters and its optimizer state; workers push gradients and pull
 * parameters. This is what a worker that is not written in Rust needs; docs/c-api.md says how to build, link and use it.
 *
 * Made by cbindgen from src/ffi: `GRADWIRE_BLESS=1 cargo test --test c_header` writes it anew.
 *
 * Every function but the two that give a text gives a gw_status, and on anything but GW_OK leaves a text for gw_last_error;
 * results are written to the caller's memory on GW_OK only. Pointers are the caller's and are not kept beyond the call, but for
 * those of gw_register. Functions may be called from any thread, those of one worker by one thread at a time. */";

fn generate() -> String {
    let mut config = cbindgen::Config {
        language: cbindgen::Language::C,
        include_guard: Some("GRADWIRE_H".into()),
        header: Some(PREAMBLE.into()),
        cpp_compat: true,
        usize_is_size_t: true,
        no_includes: true,
        sys_includes: ["stdbool.h", "stddef.h", "stdint.h"].map(String::from).to_vec(),
        documentation_style: cbindgen::DocumentationStyle::C,
        line_length: 120,
        ..cbindgen::Config::default()
    };
    let names = [
        ("Status", "gw_status"),
        ("DataType", "gw_dtype"),
        ("InitRule", "gw_init"),
        ("TensorDescription", "gw_tensor"),
        ("WorkerHandle", "gw_worker"),
        ("View", "gw_view"),
    ];
    config.export.rename = names.iter().map(|(rust, c)| (rust.to_string(), c.to_string())).collect();
    // What only numbers in a struct refer to.
    config.export.include = vec!["DataType".into(), "InitRule".into()];
    config.enumeration.rename_variants = cbindgen::RenameRule::ScreamingSnakeCase;
    // It follows the modules from there; each file named besides would be there twice.
    let builder = cbindgen::Builder::new().with_config(config).with_src(Path::new(SOURCES).join("mod.rs"));
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    // Rust's headings mean nothing in C.
    String::from_utf8(text).unwrap().replace(" * # Safety\n *\n", "")
}

/// The files of src/ffi, by name.
fn sources() -> BTreeMap<String, String> {
    let files = fs::read_dir(SOURCES).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_str().unwrap().into(), fs::read_to_string(path).unwrap())).collect()
}

#[test]
fn the_header_is_what_the_sources_say() {
    let made = generate();
    if std::env::var_os("GRADWIRE_BLESS").is_some() {
        fs::write(HEADER, &made).unwrap();
    }
    let there = fs::read_to_string(HEADER).unwrap_or_default();
    let differs = there.lines().zip(made.lines()).position(|(there, made)| there != made);
    assert!(there == made, "include/gradwire.h is out of date (line {differs:?}): run this test with GRADWIRE_BLESS=1");
}

#[test]
fn every_function_is_declared_once() {
    let header = fs::read_to_string(HEADER).unwrap();
    for text in sources().values() {
        for function in text.split("#[unsafe(no_mangle)]\n").skip(1) {
            let name = function.split("fn ").nth(1).unwrap().split('(').next().unwrap();
            let declares = |line: &str| !line.starts_with([' ', '/']) && line.contains(&format!("{name}("));
            assert_eq!(header.lines().filter(|line| declares(line)).count(), 1, "{name}");
        }
    }
}

#[test]
fn every_function_is_behind_the_panic_boundary() {
    let mut seen = 0;
    for (file, text) in sources() {
        for function in text.split("#[unsafe(no_mangle)]\n").skip(1) {
            let body = &function[..function.find("\n}\n").unwrap()];
            let name = body.split("fn ").nth(1).unwrap().split('(').next().unwrap();
            // A text that is part of the program: nothing in there can panic.
            let guarded = name == "gw_version"
                || body.contains(&format!("guard(\"{name}\"")) != body.contains(&format!("tell(\"{name}\""));
            assert!(guarded, "{file}: {name} calls neither `guard` nor `tell` with its own name");
            seen += 1;
        }
    }
    assert!(seen >= 19, "only {seen} functions found");
}
