//! How many recipients, and how long for a member.

use super::*;

const MOST: Terms = Terms {
    max_recipients: 3,
    ..TERMS
};
const TERMS: Terms = Terms {
    client: ClientSecurity::None,
    plan: Plan {
        starttls: false,
        xclient: None,
    },
    member_verified: false,
    switches: false,
    line_endings: crate::model::session::LineEndings::Strict,
    max_recipients: 0,
};
const MAIL: &str = "MAIL FROM:<a@b>\r\n";
const RCPT: &str = "RCPT TO:<c@d>\r\n";
const FULL: &str = "452 4.5.3 Too many recipients\r\n";

fn greeted() -> Lab {
    let mut lab = Lab::new(MOST);
    lab.ehlo();
    lab
}

#[test]
fn recipients_beyond_the_limit_are_refused_here_and_the_others_get_the_message() {
    let mut lab = greeted();
    for _ in 0..3 {
        lab.exchange(MAIL, "250 ok\r\n");
        lab.exchange(RCPT, "250 ok\r\n");
        lab.exchange(RCPT, "550 nobody\r\n");
        lab.exchange(RCPT, "250 ok\r\n");
        lab.exchange(RCPT, "251 elsewhere\r\n");
        lab.refused(RCPT, FULL);
        lab.exchange("NOOP\r\n", "250 ok\r\n");
        lab.refused(RCPT, FULL);
        lab.exchange("DATA\r\n", "354 go\r\n");
        lab.exchange("x\r\n.\r\n", "250 taken\r\n");
    }
    let facts = lab.session.facts();
    assert_eq!((facts.messages, facts.recipients), (3, 9));
}

#[test]
fn pipelined_recipients_are_counted_when_the_member_has_answered() {
    let mut lab = greeted();
    lab.sends(format!("{MAIL}{}DATA\r\n", RCPT.repeat(6)));
    assert_eq!(lab.reached(), format!("{MAIL}{}", RCPT.repeat(3)));
    lab.says("250 mail\r\n250 1\r\n550 2\r\n");
    assert_eq!(lab.reached(), "", "one answer is missing");
    lab.says("250 3\r\n");
    assert_eq!(lab.reached(), RCPT);
    lab.says("250 4\r\n");
    assert_eq!(lab.reached(), "DATA\r\n");
    let heard = "250 mail\r\n250 1\r\n550 2\r\n250 3\r\n250 4\r\n";
    assert_eq!(lab.heard(), format!("{heard}{FULL}{FULL}"));
    lab.exchange("", "354 go\r\n");
    lab.exchange("x\r\n.\r\n", "250 taken\r\n");
}

#[test]
fn a_refused_mail_makes_no_room() {
    let mut lab = greeted();
    lab.sends(format!("{MAIL}{}", RCPT.repeat(3)));
    lab.says("250 ok\r\n".repeat(4));
    lab.heard();
    lab.reached();
    lab.sends(format!("{MAIL}{RCPT}"));
    assert_eq!(lab.reached(), MAIL);
    lab.says("503 nested\r\n");
    assert_eq!(
        (lab.reached(), lab.heard()),
        (String::new(), format!("503 nested\r\n{FULL}"))
    );
}

#[test]
fn every_end_of_a_transaction_makes_room() {
    for (end, answer) in [
        ("RSET\r\n", "250 reset\r\n"),
        ("EHLO c\r\n", "250 mx1\r\n"),
        ("HELO c\r\n", "250 mx1\r\n"),
        ("BDAT 1 LAST\r\nx", "250 taken\r\n"),
        ("BDAT 1 LAST\r\nx", "554 no\r\n"),
    ] {
        let mut lab = greeted();
        lab.sends(format!("{MAIL}{}", RCPT.repeat(3)));
        lab.says("250 ok\r\n".repeat(4));
        lab.reached();
        // With the next transaction right behind it.
        lab.sends(format!("{end}{MAIL}{RCPT}"));
        lab.says(answer);
        lab.says("250 mail\r\n");
        lab.heard();
        assert!(lab.reached().ends_with(RCPT), "{end:?}");
        lab.says("250 rcpt\r\n");
        assert_eq!(lab.heard(), "250 rcpt\r\n", "{end:?}");
    }
}

#[test]
fn refused_recipients_are_no_errors_but_not_without_end() {
    let mut lab = greeted();
    lab.exchange(MAIL, "250 ok\r\n");
    for _ in 0..3 {
        lab.exchange(RCPT, "250 ok\r\n");
    }
    let mut borne = 0;
    while lab.end.is_none() && borne < 2000 {
        lab.sends(RCPT);
        assert_eq!(lab.reached(), "");
        borne += 1;
    }
    assert_eq!((lab.end, borne), (Some(End::TooManyErrors), 1001));
    assert!(lab.heard().ends_with("421 4.7.0 Too many errors\r\n"));
}

#[test]
fn no_limit_is_none() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.exchange(MAIL, "250 ok\r\n");
    for _ in 0..5000 {
        lab.exchange(RCPT, "250 ok\r\n");
    }
}

const NOBODY: &str = "421 4.3.2 No mail server available\r\n";

fn tells_nobody_is_left(mut lab: Lab) {
    assert_eq!(lab.heard(), NOBODY);
    assert_eq!(lab.end, Some(End::NoMember));
}

#[test]
fn the_search_for_a_member_has_an_end_whatever_it_is_at() {
    let limits = Timeouts::DEFAULT;
    let second = Duration::from_secs(1);
    let sought = || {
        let mut lab = Lab::silent(ClientSecurity::None);
        lab.session.member_sought(lab.now);
        lab
    };
    // One silent member, and then others.
    let mut lab = sought();
    lab.wait(limits.greeting);
    assert_eq!((lab.connects, lab.end), (2, None));
    lab.session.member_sought(lab.now);
    lab.wait(limits.find_member - limits.greeting - second);
    assert_eq!(lab.end, None);
    assert_eq!(lab.session.deadline(), Some(lab.now + second));
    lab.wait(second);
    tells_nobody_is_left(lab);
    // One that is silent behind others that refuse for good: it might not.
    let mut lab = sought();
    lab.says("554 no\r\n");
    lab.wait(limits.find_member);
    tells_nobody_is_left(lab);
    // Found in time: the next search has all of its own.
    let mut lab = sought();
    lab.wait(limits.greeting - second);
    lab.says("220 mx1\r\n");
    lab.heard();
    assert_eq!(lab.session.search_deadline(), None);
    lab.wait(limits.find_member);
    assert_eq!(lab.end, None);
}

#[test]
fn a_handshake_of_a_member_is_a_part_of_the_search() {
    let plan = Plan {
        starttls: true,
        xclient: None,
    };
    let mut lab = Lab::silent(Terms { plan, ..TERMS });
    lab.session.member_sought(lab.now);
    lab.says("220 mx1\r\n");
    lab.says("250-mx1\r\n250 STARTTLS\r\n");
    lab.says("220 go\r\n");
    assert!(lab.securing && lab.heard() == "220 mx1\r\n");
    assert_eq!(lab.phase(), Phase::Handshake);
    // The shell has a limit of its own.
    lab.wait(Timeouts::DEFAULT.greeting);
    assert_eq!((lab.connects, lab.end), (1, None));
    lab.wait(Timeouts::DEFAULT.find_member);
    tells_nobody_is_left(lab);
}

#[test]
fn a_stop_ends_whom_no_member_has_heard_yet() {
    const STOP: &str = "421 4.3.2 Service is shutting down\r\n";
    for sent in ["", "EHLO c\r\nMAIL FROM:<a@b>\r\n"] {
        let mut lab = Lab::silent(ClientSecurity::None);
        lab.sends(sent);
        lab.session.drain(lab.now);
        lab.offer();
        assert_eq!((lab.heard().as_str(), lab.end), (STOP, Some(End::Drained)));
        assert_eq!(lab.reached(), "");
    }
    // A command that waits for the member of another pool.
    let mut lab = Lab::new(Terms {
        client: ALLOW,
        switches: true,
        ..TERMS
    });
    lab.ehlo();
    lab.sends("MAIL FROM:<a@b>\r\n");
    assert_eq!(lab.connects, 2);
    lab.session.drain(lab.now);
    lab.offer();
    assert_eq!((lab.heard().as_str(), lab.end), (STOP, Some(End::Drained)));
}
