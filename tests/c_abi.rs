//! C and C++ programs in real jobs: the examples, alone, under valgrind and with AddressSanitizer; a plug-in; wrong
//! calls; a lost server. And what the library exports, and how it is installed.
//!
//! Invariant: every program is compiled with all warnings as errors, against the installed header alone.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
    time::{Duration, Instant},
};

use gradwire::{
    launch::{Job, JobOptions, OutputTo},
    optim::{OptimizerConfig, OptimizerKind},
    session::JobConfig,
    types::Rank,
};
use tempfile::TempDir;

#[path = "../examples/linear.rs"]
mod linear;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Long enough for valgrind on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// Header and libraries, installed as a user installs them, once for all tests.
fn installed() -> &'static Path {
    static PREFIX: LazyLock<PathBuf> = LazyLock::new(|| {
        let prefix = Path::new(env!("CARGO_TARGET_TMPDIR")).join("c");
        output(Command::new(format!("{ROOT}/scripts/install-c")).arg(&prefix).arg("dev"));
        prefix
    });
    &PREFIX
}

/// What a tool writes to standard output; it must end well.
fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn is_there(tool: &str) -> bool {
    let there = Command::new(tool).arg("--version").output().is_ok();
    assert!(there || std::env::var_os("CI").is_none(), "{tool} is not installed, and under CI nothing is skipped");
    if !there {
        eprintln!("skipped: {tool} is not installed");
    }
    there
}

/// A directory with a compiled program in it.
struct Program {
    directory: TempDir,
    path: PathBuf,
}

/// `cc` or `c++` with what every program needs; `.` in the result is the repository.
fn compiler(source: &str) -> Command {
    let (compiler, standard) = if source.ends_with(".cpp") { ("c++", "-std=c++17") } else { ("cc", "-std=c11") };
    let mut command = Command::new(compiler);
    // Contraction off: on machines with fused multiply-add the examples' sums would differ from Rust's.
    command.args([standard, "-g", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
    command.current_dir(ROOT).arg("-I").arg(installed().join("include")).arg(source);
    command
}

/// Compiles a program and links it with the shared library.
fn compile(source: &str, more: &[&str]) -> Program {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    let libraries = installed().join("lib");
    let at = format!("-Wl,-rpath,{}", libraries.display());
    let mut command = compiler(source);
    command.args(more).arg("-L").arg(libraries).args([&at, "-lgradwire", "-lm", "-lpthread", "-o"]).arg(&path);
    output(&mut command);
    Program { directory, path }
}

/// A job of one server with plain SGD, whose workers run a shell command.
fn options(home: &Path, workers: u16, learning_rate: f64, command: &str) -> JobOptions {
    let mut config = JobConfig {
        name: "c".into(),
        workers,
        optimizer: OptimizerConfig::new(OptimizerKind::SGD, learning_rate),
        join_ms: 240_000,
        deadline_ms: 60_000,
        ..JobConfig::default()
    };
    config.checkpoint.dir = Some(home.join("checkpoints"));
    let command = ["sh", "-c", command].map(OsString::from).to_vec();
    let mut options = JobOptions::new(config, command, env!("CARGO_BIN_EXE_gradwire"));
    options.home = Some(home.into());
    options.output = OutputTo::Collect;
    options
}

/// A directory for a job, closed to others as the launcher demands.
fn home() -> TempDir {
    tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir().unwrap()
}

/// Runs a job that must go well; what its workers wrote.
fn run(workers: u16, learning_rate: f64, command: &str) -> String {
    let home = home();
    let mut job = Job::start(options(home.path(), workers, learning_rate, command)).unwrap();
    let outcome = job.wait_for(PATIENCE).unwrap_or_else(|| panic!("the job did not end:\n{}", job.output()));
    assert_eq!(outcome.code, 0, "{command}: {:?}\n{}", outcome.reason, job.output());
    job.output()
}

/// Every line that tells the last loss, in order of the losses.
fn losses(output: &str) -> Vec<String> {
    let mut losses: Vec<_> = output.lines().filter_map(|line| line.split_once("the loss went to ")).collect();
    losses.sort();
    losses.into_iter().map(|(_, loss)| loss.into()).collect()
}

/// The part of a worker that is written in Rust: this test program, started again by the test below.
#[test]
fn rust_worker() {
    if std::env::var_os("GRADWIRE_RENDEZVOUS").is_some() {
        linear::main().unwrap();
    }
}

#[test]
fn c_and_cpp_learn_what_rust_learns() {
    let ourselves = std::env::current_exe().unwrap();
    let line = format!("exec {} --exact rust_worker --nocapture --test-threads=1", ourselves.display());
    let expected = losses(&run(2, 0.1, &line));
    assert!(expected.len() == 2 && expected.iter().all(|loss| loss.parse::<f32>().unwrap() < 1e-3), "{expected:?}");
    for source in ["examples/c/linear.c", "examples/c/linear.cpp"] {
        let program = compile(source, &[]);
        assert_eq!(losses(&run(2, 0.1, &format!("exec {}", program.path.display()))), expected, "{source}");
    }
}

#[test]
fn the_examples_are_clean_under_valgrind() {
    if !is_there("valgrind") {
        return;
    }
    for source in ["examples/c/linear.c", "examples/c/linear.cpp"] {
        let program = compile(source, &[]);
        let line = format!(
            "exec valgrind --quiet --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite {} 10",
            program.path.display()
        );
        assert_eq!(losses(&run(2, 0.1, &line)).len(), 2);
    }
}

#[test]
fn the_examples_and_wrong_calls_are_clean_with_address_sanitizer() {
    let sanitize = ["-fsanitize=address", "-fno-omit-frame-pointer"];
    for (source, workers, rate, said) in [
        ("examples/c/linear.c", 2, 0.1, "the loss went to"),
        ("examples/c/linear.cpp", 2, 0.1, "the loss went to"),
        ("tests/c/surface.c", 1, 1.0, "surface ok"),
    ] {
        let program = compile(source, &sanitize);
        let line = format!("ASAN_OPTIONS=detect_leaks=1 exec {}", program.path.display());
        let output = run(workers, rate, &line);
        assert_eq!(output.matches(said).count(), usize::from(workers), "{output}");
    }
}

#[test]
fn every_wrong_call_gives_a_status_and_a_text() {
    let program = compile("tests/c/surface.c", &[]);
    let output = run(1, 1.0, &format!("exec {}", program.path.display()));
    assert!(output.contains("surface ok"), "{output}");
}

/// A broken connection must reach a C program as a status: Rust programs ignore SIGPIPE, C programs are ended by it.
#[test]
fn a_lost_server_is_a_status_and_no_signal() {
    let (program, home) = (compile("tests/c/lost.c", &[]), home());
    let mut options = options(home.path(), 1, 0.1, &format!("exec {}", program.path.display()));
    options.grace = Duration::from_secs(60);
    let mut job = Job::start(options).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !job.output().contains("stepping") {
        assert!(Instant::now() < deadline && job.wait_for(Duration::from_millis(10)).is_none(), "{}", job.output());
    }
    job.kill(Rank::server(0), nix::sys::signal::Signal::SIGKILL);
    let outcome = job.wait_for(PATIENCE).unwrap_or_else(|| panic!("the job did not end:\n{}", job.output()));
    assert_ne!(outcome.code, 0);
    let output = job.output();
    let told = output.lines().find(|line| line.contains("status 7: gw_")).expect(&output);
    assert!(told.contains("server 0") && output.contains("closed"), "{output}");
}

#[test]
fn a_plug_in_uses_the_programs_library_or_brings_its_own() {
    let shared = compile("tests/c/plugin.c", &["-shared", "-fPIC"]);
    let host = compile("tests/c/host.c", &["-DUSES_GRADWIRE", "-ldl"]);
    let line = |host: &Program, plugin: &Path| format!("exec {} {}", host.path.display(), plugin.display());
    assert!(run(1, 1.0, &line(&host, &shared.path)).contains("plug-in ok"));
    // A host that does not know of gradwire, with either kind of library behind the plug-in.
    let bare = shared.directory.path().join("bare");
    output(compiler("tests/c/host.c").args(["-ldl", "-o"]).arg(&bare));
    let bare = Program { directory: tempfile::tempdir().unwrap(), path: bare };
    let alone = shared.directory.path().join("alone.so");
    let mut link = compiler("tests/c/plugin.c");
    link.args(["-shared", "-fPIC", "-Wl,--exclude-libs,ALL"]).arg(installed().join("lib/libgradwire.a"));
    output(link.args(["-lm", "-lpthread", "-ldl", "-o"]).arg(&alone));
    for plugin in [&shared.path, &alone] {
        assert!(run(1, 1.0, &line(&bare, plugin)).contains("plug-in ok"));
    }
}

/// The functions that the header declares.
fn declared() -> BTreeSet<String> {
    let header = fs::read_to_string(Path::new(ROOT).join("include/gradwire.h")).unwrap();
    let lines = header.lines().filter(|line| !line.starts_with([' ', '/', '*']));
    let names = lines.filter_map(|line| line.split_once('(')?.0.split([' ', '*']).next_back());
    names.filter(|name| name.starts_with("gw_")).map(String::from).collect()
}

#[test]
fn the_library_exports_what_the_header_declares_and_nothing_else() {
    let table = output(Command::new("nm").args(["-D", "--defined-only"]).arg(installed().join("lib/libgradwire.so")));
    let exported: BTreeSet<String> =
        table.lines().filter_map(|line| line.split(' ').next_back()).map(String::from).collect();
    let declared = declared();
    assert!(declared.len() >= 19 && declared.contains("gw_push_pull"), "the header was misread: {declared:?}");
    assert_eq!(exported, declared);
}

#[test]
fn it_installs_and_pkg_config_finds_it() {
    if !is_there("pkg-config") {
        return;
    }
    let (prefix, folder) = (installed(), tempfile::tempdir().unwrap());
    let ask = |question: &[&str]| {
        let mut command = Command::new("pkg-config");
        let path = prefix.join("lib/pkgconfig");
        let text = output(command.env("PKG_CONFIG_PATH", path).args(question).arg("gradwire"));
        text.split_whitespace().map(String::from).collect::<Vec<_>>()
    };
    assert_eq!(ask(&["--modversion"]), [env!("CARGO_PKG_VERSION")]);
    let archive = |word: String| if word == "-lgradwire" { "-l:libgradwire.a".into() } else { word };
    let (shared, fixed): (Vec<_>, Vec<_>) =
        (ask(&["--cflags", "--libs"]), ask(&["--static", "--cflags", "--libs"]).into_iter().map(archive).collect());
    for (words, library) in [(shared, true), (fixed, false)] {
        let program = folder.path().join("linear");
        // Only what pkg-config says, not the repository's header.
        let mut command = Command::new("cc");
        command.arg(format!("{ROOT}/examples/c/linear.c")).args(words).args(["-lm", "-o"]).arg(&program);
        output(&mut command);
        let needed = output(Command::new("readelf").arg("-d").arg(&program));
        assert_eq!(needed.contains("[libgradwire.so]"), library, "{needed}");
        let line = format!("LD_LIBRARY_PATH={}/lib exec {} 20", prefix.display(), program.display());
        assert_eq!(losses(&run(2, 0.1, &line)).len(), 2);
    }
}
