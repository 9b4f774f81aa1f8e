//! The rendezvous over real sockets: a job's start from end to end, and every kind of caller that must be refused.
//!
//! Invariant: each test has its own port; each ends with the job still running, unless it is about its end.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    layout::TensorSpec,
    session::JobConfig,
    transport::Endpoint,
    types::{PeerId, Rank, Role, ShardId},
    wire::JobToken,
};

struct Job {
    rendezvous: Rendezvous,
    token: JobToken,
    notices: Receiver<Notice>,
    checkpoints: Receiver<(u64, usize)>,
}

fn start(workers: u16, change: impl FnOnce(&mut JobConfig)) -> Job {
    let mut config = JobConfig { workers, name: "test".into(), ..JobConfig::default() };
    change(&mut config);
    let token = JobToken::random().unwrap();
    let ((on_notice, notices), (on_checkpoint, checkpoints)) = (channel(), channel());
    let options = RendezvousOptions {
        listen: "127.0.0.1:0".parse().unwrap(),
        reserved: BTreeSet::new(),
        on_notice: Box::new(move |notice| drop(on_notice.send(notice))),
        on_checkpoint: Box::new(move |clock, parts, _| {
            on_checkpoint.send((clock, parts.len())).unwrap();
            Ok(())
        }),
        tenures: None,
    };
    let rendezvous = Rendezvous::start(config, token.clone(), options).unwrap();
    Job { rendezvous, token, notices, checkpoints }
}

impl Job {
    fn join(&self, role: Role, rank: u16) -> Member {
        Member::join(&self.rendezvous.address(), &self.token, role, Some(rank)).unwrap()
    }

    fn dial(&self) -> (TcpStream, BufReader<TcpStream>) {
        let stream = TcpStream::connect(self.rendezvous.listening()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (stream.try_clone().unwrap(), BufReader::new(stream))
    }

    fn notice(&self, wanted: impl Fn(&Notice) -> bool) -> Notice {
        loop {
            let notice = self.notices.recv_timeout(Duration::from_secs(10)).expect("no such notice came");
            if wanted(&notice) {
                return notice;
            }
        }
    }

    /// Sends these bytes to the port and gives back all that was answered until the other side hung up.
    fn answer_to(&self, bytes: &[u8]) -> String {
        let (mut stream, mut reader) = self.dial();
        let mut challenge = String::new();
        reader.read_line(&mut challenge).unwrap();
        // The port may hang up while we still send.
        let _ = stream.write_all(bytes);
        let mut answer = String::new();
        let _ = reader.read_to_string(&mut answer);
        answer
    }
}

fn wait_command(member: &mut Member) -> Result<Command> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if let Some(command) = member.poll_command()? {
            return Ok(command);
        }
        let fd = nix::poll::PollFd::new(member.fd(), nix::poll::PollFlags::POLLIN);
        nix::poll::poll(&mut [fd], 1000u16).unwrap();
    }
    panic!("no command came");
}

#[test]
fn a_job_starts_from_end_to_end() {
    let job = start(2, |config| (config.seed, config.checkpoint.dir) = (u64::MAX, Some("/c".into())));
    let workers: Vec<_> = (0..2)
        .map(|index| {
            let mut member = job.join(Role::Worker, index);
            thread::spawn(move || {
                assert_eq!(member.config().seed, u64::MAX);
                let view = member.declare(vec![TensorSpec::new(format!("t{index}"), vec![4])]).unwrap();
                assert_eq!(view.declarations[1][0].name, "t1");
                let offers = member.exchange(Vec::new()).unwrap();
                assert_eq!(offers.len(), 1);
                assert_eq!(offers[0].2, Endpoint::new("tcp", format!("for {index}")));
                member.barrier("start").unwrap();
                member
            })
        })
        .collect();
    let mut server = job.join(Role::Server, 0);
    assert_eq!(server.view().unwrap().workers, 2);
    let at = |index: u16| Endpoint::new("tcp", format!("for {index}"));
    let offers = (0..2).map(|index| (PeerId::server(0, 0), PeerId::worker(index), at(index))).collect();
    assert!(server.exchange(offers).unwrap().is_empty());
    server.barrier("start").unwrap();
    let mut workers: Vec<Member> = workers.into_iter().map(|thread| thread.join().unwrap()).collect();

    // A checkpoint on demand, reported from another thread.
    let (address, token) = (job.rendezvous.address(), job.token.clone());
    let asking = thread::spawn(move || control(&address, &token, Control::Checkpoint, Duration::from_secs(10)));
    let Command::Checkpoint { clock } = wait_command(&mut server).unwrap() else { panic!() };
    let reporter = server.reporter();
    thread::spawn(move || reporter.report(Report::CheckpointWritten { shard: ShardId(0), clock, info: 1.into() }))
        .join()
        .unwrap()
        .unwrap();
    assert!(matches!(asking.join().unwrap(), Ok(ControlAnswer::CheckpointWritten(written)) if written == clock));
    assert_eq!(job.checkpoints.recv().unwrap(), (clock, 1));

    // The end: the last word of a rank that leaves at once still arrives.
    for worker in workers.drain(..) {
        worker.reporter().report(Report::Finished { summary: 7.into() }).unwrap();
    }
    job.notice(|notice| matches!(notice, Notice::Finished { rank, .. } if *rank == Rank::worker(1)));
    // There is a directory for checkpoints, so the state is stored at the end.
    assert!(matches!(wait_command(&mut server), Ok(Command::End { checkpoint: true, .. })));
}

#[test]
fn wrong_callers_are_refused_and_the_job_goes_on() {
    let job = start(1, |_| {});
    let _server = job.join(Role::Server, 0);
    let address = job.rendezvous.address();
    let refusal = |token: &JobToken, role, rank| Member::join(&address, token, role, rank).unwrap_err().to_string();
    let wrong = JobToken::random().unwrap();
    assert!(refusal(&wrong, Role::Worker, Some(0)).contains("wrong token"));
    assert!(refusal(&job.token, Role::Server, Some(0)).contains("server 0 has joined already"));
    assert!(refusal(&job.token, Role::Worker, Some(5)).contains("there is no worker 5"));
    let text = control(&address, &wrong, Control::Status, Duration::from_secs(5)).unwrap_err().to_string();
    assert!(text.contains("wrong token"), "{text}");

    let line = |version: &str| {
        format!(
            r#"{{"version":"{version}","purpose":"join","role":"worker","rank":0,"nonce":"00","mac":"","pid":1,"host":"h"}}"#
        ) + "\n"
    };
    assert!(job.answer_to(line("0/0.0.0").as_bytes()).contains("speaks version"));
    assert!(job.answer_to(line(VERSION).as_bytes()).contains("no token"));
    assert!(job.answer_to(b"GET / HTTP/1.1\r\n\r\n").contains("no answer to its challenge"));
    assert!(job.answer_to(&[0xff; 3000]).contains("no proof of the token within 5 s"));
    assert!(job.answer_to(&[b'x'; 5000]).contains("longer than 4096"));

    let mut worker = job.join(Role::Worker, 0);
    assert_eq!(worker.declare(Vec::new()).unwrap().workers, 1);
}

/// Bytes of every length, from plain noise to answers with a bit flipped: none may disturb the job, none may be believed.
#[test]
fn noise_at_the_port_disturbs_nobody() {
    let job = start(1, |_| {});
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let honest = format!(
        r#"{{"version":"{VERSION}","purpose":"join","role":"worker","rank":0,"nonce":"{:064x}","mac":"{:064x}","pid":1,"host":"h"}}"#,
        1, 2
    );
    for round in 0..2000 {
        let mut bytes = if round % 2 == 0 { honest.clone().into_bytes() } else { vec![0; (random() % 600) as usize] };
        match round % 2 {
            0 => (0..random() % 4).for_each(|_| {
                let at = (random() % bytes.len() as u64) as usize;
                bytes[at] ^= 1 << (random() % 8);
            }),
            _ => bytes.iter_mut().for_each(|byte| *byte = random() as u8),
        }
        bytes.push(b'\n');
        let (mut stream, _) = job.dial();
        let _ = stream.write_all(&bytes);
    }
    assert!(job.notices.try_recv().is_err(), "nobody has joined");
    let (mut server, mut worker) = (job.join(Role::Server, 0), job.join(Role::Worker, 0));
    let waiting = thread::spawn(move || server.view().unwrap());
    assert_eq!(worker.declare(Vec::new()).unwrap(), waiting.join().unwrap());
}

#[test]
fn silent_callers_do_not_keep_honest_ones_out() {
    let job = start(1, |_| {});
    let _silent: Vec<_> = (0..200).map(|_| TcpStream::connect(job.rendezvous.listening()).unwrap()).collect();
    let began = Instant::now();
    let _server = job.join(Role::Server, 0);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}

#[test]
fn a_rank_that_speaks_nonsense_fails_by_name_and_a_vanished_one_is_lost() {
    let job = start(2, |_| {});
    let member = job.join(Role::Worker, 1);
    drop(member);
    assert_eq!(job.notice(|notice| matches!(notice, Notice::Lost(_))), Notice::Lost(Rank::worker(1)));
    // A reporter outlives its member, and can say how it ended.
    let reporter = job.join(Role::Worker, 0).reporter();
    reporter.report(Report::Failed { text: "disk full".into(), elsewhere: false }).unwrap();
    let failed = job.notice(|notice| matches!(notice, Notice::Failed { .. }));
    assert!(matches!(failed, Notice::Failed { rank, text, .. } if rank == Rank::worker(0) && text == "disk full"));
}

#[test]
fn the_missing_rank_is_named_and_the_others_hear_it() {
    let job = start(2, |config| config.join_ms = 300);
    let mut worker = job.join(Role::Worker, 0);
    let waiting = thread::spawn(move || worker.declare(Vec::new()).unwrap_err().to_string());
    let Notice::TimedOut(text) = job.notice(|notice| matches!(notice, Notice::TimedOut(_))) else { panic!() };
    assert_eq!(text, "server 0 and worker 1 have not joined within 0.3 s");
    job.rendezvous.order(Order::Fail(text.clone()));
    assert_eq!(waiting.join().unwrap(), text);
}

#[test]
fn the_end_of_the_launcher_ends_the_ranks() {
    let job = start(1, |_| {});
    let mut server = job.join(Role::Server, 0);
    let commands = server.commands().unwrap();
    let reporter = server.reporter();
    drop(job);
    assert!(wait_command(&mut server).unwrap_err().to_string().contains("launcher was lost"));
    assert!(commands.poll().is_err());
    // The first write after the other side has hung up may still be taken by the kernel.
    let outcomes: Vec<_> = (0..50)
        .map(|clock| {
            thread::sleep(Duration::from_millis(2));
            reporter.report(Report::Progress { clock })
        })
        .collect();
    assert!(outcomes.last().unwrap().is_err());
}

#[test]
fn every_stream_of_commands_hears_every_command() {
    let job = start(1, |_| {});
    let mut server = job.join(Role::Server, 0);
    job.rendezvous.order(Order::Stop("enough".into()));
    let stop = wait_command(&mut server).unwrap();
    assert!(matches!(&stop, Command::Stop { reason, checkpoint: false, clock: None } if reason == "enough"));
    let late = server.commands().unwrap();
    assert_eq!(late.poll().unwrap(), Some(stop), "whoever subscribes later hears it too");
    assert_eq!(late.poll().unwrap(), None);
}

#[test]
fn an_impostor_of_the_launcher_is_refused() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::from(listener.local_addr().unwrap());
    let impostor = thread::spawn(move || {
        for reply in ["{\"accepted\":\"00\"}\n", "220 mail ESMTP\n"] {
            let (mut stream, _) = listener.accept().unwrap();
            let hello = format!(r#"{{"gradwire":"rendezvous","version":"{VERSION}","nonce":"00"}}"#);
            if reply.starts_with('{') {
                stream.write_all(format!("{hello}\n").as_bytes()).unwrap();
            }
            stream.write_all(reply.as_bytes()).unwrap();
            let _ = stream.read(&mut [0; 4096]);
        }
    });
    let token = JobToken::random().unwrap();
    let refused = || Member::join(&address, &token, Role::Server, None).unwrap_err().to_string();
    assert!(refused().contains("does not hold the job's token"));
    assert!(refused().contains("does not speak the rendezvous protocol"));
    impostor.join().unwrap();
}
