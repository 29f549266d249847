//! What the members for plaintext announce is asked for behind the sessions' backs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::{
    peers::{Kind, Lab, Member, Setup, good, until},
    switch::legacy,
};
use crate::{model::StartTls, proxy::Service};

/// Older than an answer that sessions go by without a question.
const OLD: Duration = Duration::from_secs(61);
/// Less than a member may take to answer.
const AT_ONCE: Duration = Duration::from_secs(1);
/// What clients hear while the member below is known.
const BOTH: &str = "250-good\r\n250-PIPELINING\r\n250-SIZE 1000\r\n250 STARTTLS\r\n";

/// A member's conduct: how often it was connected, and whether it says nothing.
struct Conduct {
    asked: AtomicUsize,
    mute: AtomicBool,
}

impl Conduct {
    const fn new() -> Self {
        Self {
            asked: AtomicUsize::new(0),
            mute: AtomicBool::new(false),
        }
    }

    fn meet(&self, member: &mut Member) {
        self.asked.fetch_add(1, Relaxed);
        if !self.mute.load(Relaxed) {
            return legacy(member);
        }
        assert_eq!(member.line(), None);
        let _ = member.log.send(b"left".to_vec());
    }
}

fn lab(plaintext: &'static [fn(&mut Member)]) -> (Lab, Arc<Service>) {
    let setup = Setup {
        kind: Kind::StartTls(StartTls::Allow),
        plaintext: Some(plaintext),
        ..Setup::default()
    };
    let lab = Lab::made(setup, &[good]);
    let service = lab.services.find(lab.address).unwrap();
    (lab, service)
}

fn hears(lab: &Lab, ehlo: &str) {
    let mut client = lab.connect();
    client.reply();
    assert_eq!(client.ask("EHLO c.example"), ehlo);
}

#[test]
fn no_session_waits_for_a_member_that_has_answered_once() {
    static CONDUCT: Conduct = Conduct::new();
    let (lab, service) = lab(&[|member| CONDUCT.meet(member)]);
    let fallback = service.plaintext.as_ref().unwrap();
    hears(&lab, BOTH);
    CONDUCT.mute.store(true, Relaxed);
    fallback.age(OLD);
    let begun = Instant::now();
    for _ in 0..5 {
        hears(&lab, BOTH);
    }
    assert!(
        begun.elapsed() < AT_ONCE,
        "greeted after {:?}",
        begun.elapsed()
    );
    assert!(fallback.is_asking());
    until("the question", || CONDUCT.asked.load(Relaxed) == 2);
    until("it to be given up", || !fallback.is_asking());
    // It failed, and the answer before it counts; the next question is not due yet.
    hears(&lab, BOTH);
    assert_eq!(CONDUCT.asked.load(Relaxed), 2);
    // Too old to go by, and asked for in vain just now.
    CONDUCT.mute.store(false, Relaxed);
    fallback.age(Duration::from_secs(600));
    hears(&lab, BOTH);
    assert_eq!(CONDUCT.asked.load(Relaxed), 3);
}

#[test]
fn sessions_that_know_nothing_wait_for_one_question_and_not_for_ever() {
    static CONDUCT: Conduct = Conduct::new();
    CONDUCT.mute.store(true, Relaxed);
    let (lab, service) = lab(&[|member| CONDUCT.meet(member)]);
    let begun = Instant::now();
    let mut clients = [lab.connect(), lab.connect(), lab.connect()];
    for client in &mut clients {
        client.reply();
        assert!(begun.elapsed() >= AT_ONCE, "nobody waited");
        assert_eq!(client.ask("EHLO c"), "250-good\r\n250 STARTTLS\r\n");
    }
    assert_eq!(CONDUCT.asked.load(Relaxed), 1);
    // Who did not answer is not waited for again.
    until("it to be given up", || {
        !service.plaintext.as_ref().unwrap().is_asking()
    });
    let begun = Instant::now();
    hears(&lab, "250-good\r\n250 STARTTLS\r\n");
    assert!(begun.elapsed() < AT_ONCE);
}

#[test]
fn a_member_that_keeps_its_greeting_back_is_heard_late() {
    let (lab, service) = lab(&[|member| {
        let time = Some(Duration::from_secs(3));
        member.tcp().set_read_timeout(time).unwrap();
        assert_eq!(member.line(), None, "somebody talked early");
        member.tcp().set_read_timeout(None).unwrap();
        legacy(member);
    }]);
    hears(&lab, "250-good\r\n250 STARTTLS\r\n");
    until("the answer", || {
        !service.plaintext.as_ref().unwrap().is_asking()
    });
    hears(&lab, BOTH);
}

#[test]
fn a_question_ends_with_its_virtual_server() {
    static CONDUCT: Conduct = Conduct::new();
    let (lab, service) = lab(&[|member| CONDUCT.meet(member)]);
    hears(&lab, BOTH);
    lab.seen();
    CONDUCT.mute.store(true, Relaxed);
    service.plaintext.as_ref().unwrap().age(OLD);
    hears(&lab, BOTH);
    until("the question", || CONDUCT.asked.load(Relaxed) == 2);
    let begun = Instant::now();
    drop(service);
    lab.services.replace([]);
    while lab.seen() != "left" {}
    assert!(begun.elapsed() < AT_ONCE, "it took {:?}", begun.elapsed());
}
