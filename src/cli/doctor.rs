//! `gradwire doctor`: what is wrong with this machine, or with the way to another, and what mends it.
//!
//! Invariant: the exit status is 0 if nothing was found wrong and 1 if something was; a token
//! that was given is never printed, and one made here only to standard error.
#![forbid(unsafe_code)]

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::json;

use crate::{
    Error, Result,
    mem::Topology,
    session::token_from_environment,
    tools::doctor::{Figures, Item, Listener, PORT, Tree, Tried, Verdict, call, examine, try_fabrics},
    wire::JobToken,
};

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire doctor                         this machine: RDMA devices, limits, kernel, and each fabric tried on itself
  gradwire doctor --json | jq '.items[] | select(.verdict == \"wrong\")'
  gradwire doctor --listen                there: prints a one-time token and waits for one caller
  GRADWIRE_TOKEN=... gradwire doctor HOST here: can it be reached, how large are packets, how fast is it

Each item is `fine`, `WRONG` (it keeps something from working, or from working well) or `not here` (the machine lacks it and
does without); below it stands the line that mends it. Run it as the job is run: the same user, shell or container, since limits and
capabilities are those of the process.

The pair test is a connection as a job makes it: both ends prove to each other that they hold the token, which is taken from
GRADWIRE_TOKEN or GRADWIRE_TOKEN_FILE on both sides; without either, --listen makes one that is good for this test alone.
Latency is the time from a write of 64 bytes to the note that answers it; bandwidth is that of 1 MiB writes in one direction.

Exit status: 0 nothing is wrong, 1 something is, 2 the command line is.")]
pub(super) struct DoctorArguments {
    /// Test the way to this host, where `gradwire doctor --listen` waits.
    #[arg(value_name = "HOST[:PORT]")]
    host: Option<String>,
    /// Wait for one caller [default address: every interface, port 7313].
    #[arg(long, value_name = "ADDRESS:PORT", num_args = 0..=1, conflicts_with = "host")]
    listen: Option<Option<SocketAddr>>,
    /// How long to wait for the caller.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, requires = "listen")]
    wait: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Examines, listens or calls.
pub(super) fn run(arguments: &DoctorArguments) -> Result<ExitCode> {
    match (&arguments.host, arguments.listen) {
        (Some(host), _) => test_pair(host, arguments.json),
        (None, Some(address)) => {
            let everywhere = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), PORT);
            listen(address.unwrap_or(everywhere), Duration::from_secs(arguments.wait.into()), arguments.json)
        }
        (None, None) => Ok(test_machine(arguments.json)),
    }
}

fn test_machine(as_json: bool) -> ExitCode {
    let items = examine(&Tree::here(), &Topology::discover());
    let fabrics = try_fabrics();
    let wrong = items.iter().filter(|item| item.verdict == Verdict::Wrong).count()
        + fabrics.iter().filter(|tried| tried.error.is_some()).count();
    if as_json {
        println!("{}", json!({ "items": items, "fabrics": fabrics, "wrong": wrong }));
    } else {
        print!("{}{}", table(&items), fabric_table(&fabrics));
        match wrong {
            0 => println!("nothing is wrong"),
            _ => println!("{wrong} wrong; what mends it stands behind the arrows"),
        }
    }
    ExitCode::from(u8::from(wrong > 0))
}

fn table(items: &[Item]) -> String {
    let mut text = String::new();
    for item in items {
        let subject = if item.subject.is_empty() { String::new() } else { format!("{}: ", item.subject) };
        text += &format!("{:<9} {:<14} {subject}{}\n", item.verdict.name(), item.topic, item.found);
        if let Some(mend) = &item.mend {
            text += &format!("{:<9} {:<14} -> {mend}\n", "", "");
        }
    }
    text
}

fn fabric_table(fabrics: &[Tried]) -> String {
    let lines = fabrics.iter().map(|tried| match (&tried.figures, &tried.error) {
        (Some(figures), _) => format!("{:<9} {:<14} {}: {}\n", "fine", "loopback", tried.fabric, spoken(figures)),
        (None, why) => {
            format!("{:<9} {:<14} {}: {}\n", "WRONG", "loopback", tried.fabric, why.as_deref().unwrap_or(""))
        }
    });
    lines.collect()
}

fn spoken(figures: &Figures) -> String {
    format!(
        "64 B written and answered in {:.1} us (99 %: {:.1} us), 1 MiB writes at {:.2} GB/s",
        figures.latency_us_p50,
        figures.latency_us_p99,
        figures.bytes_per_s / 1e9
    )
}

/// The token of the environment; `None` where there is none at all. One that cannot be used is an error, not a reason to make
/// another.
fn given_token() -> Result<Option<JobToken>> {
    let is_set = ["GRADWIRE_TOKEN", "GRADWIRE_TOKEN_FILE"].iter().any(|name| std::env::var_os(name).is_some());
    is_set.then(token_from_environment).transpose()
}

fn listen(address: SocketAddr, time: Duration, as_json: bool) -> Result<ExitCode> {
    let given = given_token()?;
    let token = given.clone().map_or_else(JobToken::random, Ok)?;
    let mut listener = Listener::open(address, &token)?;
    let addresses = listener.addresses()?;
    let first = addresses.split(',').next().unwrap_or_default();
    let variable = match given {
        Some(_) => String::new(),
        None => format!("GRADWIRE_TOKEN={} ", token.to_hex()),
    };
    eprintln!("waiting {} s at {addresses}; on the other host:\n  {variable}gradwire doctor {first}", time.as_secs());
    listener.answer(Instant::now() + time)?;
    match as_json {
        true => println!("{}", json!({ "answered": true })),
        false => println!("a caller has tested the way here; it has the figures"),
    }
    Ok(ExitCode::SUCCESS)
}

fn test_pair(host: &str, as_json: bool) -> Result<ExitCode> {
    let token = given_token()?.ok_or_else(|| {
        Error::Config(
            "a pair is tested under a token: start `gradwire doctor --listen` there, and set GRADWIRE_TOKEN here to what it \
             prints"
                .into(),
        )
    })?;
    let reached = call(host, &token)?;
    if as_json {
        println!("{}", serde_json::to_string(&reached).expect("figures under text keys"));
        return Ok(ExitCode::SUCCESS);
    }
    println!("fine      reachability   {}", reached.address);
    match reached.mtu {
        Some(mtu) => println!("fine      mtu            packets of {mtu} bytes on this host's way there"),
        None => println!("not here  mtu            the kernel tells it for IPv4 only"),
    }
    println!("fine      tcp            {}", spoken(&reached.figures));
    Ok(ExitCode::SUCCESS)
}
