//! How a member, or one after another, learns who the client is: by its EHLO or HELO, and by XCLIENT.

use super::*;

const XCLIENT: &str = "250-mx1\r\n250 XCLIENT ADDR HELO PROTO\r\n";

fn introducing() -> Terms {
    Terms {
        plan: Plan {
            xclient: Some(([192, 0, 2, 7], 4711).into()),
            ..Plan::default()
        },
        ..Terms::from(ClientSecurity::None)
    }
}

#[test]
fn a_refused_introduction_does_not_hide_the_client() {
    let mut lab = Lab::new(introducing());
    for (hello, probe, refusal) in [
        ("EHLO\r\n", "EHLO \r\n", "501 name?\r\n"),
        ("EHLO c\r\n", "EHLO c\r\n", "450 later\r\n"),
        ("EHLO c\r\n", "EHLO c\r\n", "500 what\r\n"),
        ("HELO\r\n", "EHLO \r\n", "501 name?\r\n"),
        ("HELO c\r\n", "EHLO c\r\n", "550 no\r\n"),
    ] {
        lab.sends(hello);
        assert_eq!(lab.reached(), probe);
        lab.says(refusal);
        assert_eq!(lab.heard(), refusal, "{hello:?}");
        lab.refused("MAIL FROM:<a@b>\r\n", "503 5.5.1 ");
        lab.refused("VRFY a\r\n", "503 5.5.1 ");
    }
    lab.sends("EHLO c\r\nMAIL FROM:<a@b>\r\n");
    assert_eq!(lab.reached(), "EHLO c\r\n");
    lab.says(XCLIENT);
    assert_eq!(
        lab.reached(),
        "XCLIENT ADDR=192.0.2.7 HELO=c PROTO=ESMTP\r\n"
    );
    lab.says("220 mx1\r\n");
    assert_eq!(lab.reached(), "EHLO c\r\n");
    lab.says(XCLIENT);
    assert_eq!(
        (lab.heard(), lab.reached()),
        ("250 mx1\r\n".into(), "MAIL FROM:<a@b>\r\n".into())
    );
}

#[test]
fn helo_introduces_the_client_unless_the_member_knows_no_ehlo() {
    let mut lab = Lab::new(introducing());
    // A member that knows no EHLO, and does not like this name.
    lab.sends("HELO x\r\n");
    assert_eq!(lab.reached(), "EHLO x\r\n");
    lab.says("502 what\r\n");
    assert_eq!(
        (lab.reached().as_str(), lab.heard().as_str()),
        ("HELO x\r\n", "")
    );
    lab.says("550-no\r\n550 no\r\n");
    assert_eq!(lab.heard(), "550-no\r\n550 no\r\n");
    lab.refused("MAIL FROM:<a@b>\r\n", "503 ");
    let mut old = lab;
    old.sends("HELO c\r\n");
    old.says("500 what\r\n");
    assert_eq!(old.reached(), "EHLO c\r\nHELO c\r\n");
    old.says("250-mx1\r\n250 hi\r\n");
    assert_eq!(old.heard(), "250 mx1\r\n");
    old.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    old.exchange("HELO c\r\n", "250 mx1\r\n");
    // One that knows it, at the second name.
    let mut lab = Lab::new(introducing());
    lab.sends("HELO x\r\n");
    lab.says("501 no\r\n");
    let said = (lab.reached(), lab.heard());
    assert_eq!(said, ("EHLO x\r\n".into(), "501 no\r\n".into()));
    lab.refused("MAIL FROM:<a@b>\r\n", "503 ");
    lab.sends("HELO c\r\n");
    lab.says(XCLIENT);
    lab.says("220 mx1\r\n");
    assert_eq!(
        lab.reached(),
        "EHLO c\r\nXCLIENT ADDR=192.0.2.7 HELO=c PROTO=SMTP\r\nHELO c\r\n"
    );
    lab.says("250 mx1\r\n");
    lab.heard();
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
}

/// What members say to the client behind XCLIENT, each in its turn, and what the client hears to its hello.
fn introduced(hello: &str, verdicts: &[&str]) -> (Lab, String) {
    let mut lab = Lab::new(introducing());
    for (at, verdict) in verdicts.iter().enumerate() {
        match at {
            0 => lab.sends(hello),
            _ => {
                lab.session.member_connected(OWN, lab.now);
                lab.says("220 mx1\r\n");
            }
        }
        lab.says("250-mx1\r\n250 XCLIENT ADDR\r\n");
        assert_eq!(lab.reached(), "EHLO c\r\nXCLIENT ADDR=192.0.2.7\r\n");
        lab.says(verdict);
        assert_eq!((lab.connects, lab.heard().as_str()), (at + 2, ""));
    }
    lab.session.no_member();
    lab.offer();
    assert_eq!(lab.end, Some(End::NoMember));
    let heard = lab.heard();
    (lab, heard)
}

#[test]
fn a_client_that_members_do_not_want_hears_so() {
    const OURS: &str = "421 4.3.2 No mail server available\r\n";
    for (verdicts, heard) in [
        (&["554-go\r\n554 away\r\n"][..], "554-go\r\n554 away\r\n"),
        (&["421 busy\r\n"], "421 busy\r\n"),
        (&["554 no\r\n", "554 never\r\n"], "554 never\r\n"),
        (&["554 no\r\n", "450 later\r\n"], "450 later\r\n"),
        // They do not agree.
        (&["450 later\r\n", "554 no\r\n"], OURS),
        (&["550 you may not\r\n", "554 no\r\n"], OURS),
        (&["junk\r\n", "554 no\r\n"], OURS),
    ] {
        for hello in ["EHLO c\r\n", "HELO c\r\n"] {
            let (lab, said) = introduced(hello, verdicts);
            assert_eq!(said, heard, "{verdicts:?}");
            let refused = verdicts[0].starts_with("550").then_some(Fault::Xclient);
            assert_eq!(lab.complaint, refused, "{verdicts:?}");
        }
    }
}

/// The client asks for mail, and the member of the other pool is there.
fn switch(lab: &mut Lab) {
    lab.reached();
    lab.heard();
    lab.sends("MAIL FROM:<a@b>\r\n");
    assert_eq!((lab.connects, lab.reached().as_str()), (2, ""));
    lab.session.member_connected(OWN, lab.now);
    lab.says("220 legacy\r\n");
}

#[test]
fn a_refused_introduction_is_not_said_to_another_member() {
    let choosing = || {
        Lab::new(Terms {
            switches: true,
            ..Terms::from(ALLOW)
        })
    };
    for refused in ["EHLO\r\n", "HELO x\r\n"] {
        // The one before it holds.
        let mut lab = choosing();
        lab.ehlo();
        lab.exchange(refused, "501 no\r\n");
        switch(&mut lab);
        assert_eq!(lab.reached(), "EHLO c.example\r\n", "{refused:?}");
        lab.says(CAPABLE);
        assert_eq!(lab.reached(), "MAIL FROM:<a@b>\r\n");
        // There was none: it is for the member to say what it wants.
        let mut lab = choosing();
        lab.exchange(refused, "501 no\r\n");
        switch(&mut lab);
        assert_eq!(lab.reached(), "MAIL FROM:<a@b>\r\n", "{refused:?}");
        lab.says("503 hello?\r\n");
        assert_eq!(lab.heard(), "503 hello?\r\n");
    }
    let mut lab = choosing();
    lab.exchange("HELO c\r\n", "250 mx1\r\n");
    switch(&mut lab);
    assert_eq!(lab.reached(), "HELO c\r\n");
}

#[test]
fn nobody_gets_to_the_other_pool_without_a_name_where_that_is_told_of_the_client() {
    let mut lab = Lab::new(Terms {
        client: ALLOW,
        switches: true,
        ..introducing()
    });
    // Its first member knows the client, and accepted nothing.
    lab.sends("EHLO x\r\n");
    lab.says(XCLIENT);
    lab.says("220 mx1\r\n");
    lab.says("550 no\r\n");
    assert!(lab.reached().ends_with("EHLO x\r\n"));
    assert_eq!(lab.heard(), "550 no\r\n");
    lab.refused("MAIL FROM:<a@b>\r\n", "503 5.5.1 ");
    lab.sends("EHLO c\r\n");
    lab.says(XCLIENT);
    switch(&mut lab);
    assert_eq!(lab.reached(), "EHLO c\r\n");
    lab.says(XCLIENT);
    assert!(lab.reached().starts_with("XCLIENT ADDR=192.0.2.7 "));
}

#[test]
fn a_member_for_plaintext_that_refuses_the_introduction_is_passed_over() {
    for refusal in ["421 bye\r\n", "550 no\r\n"] {
        let mut lab = Lab::new(Terms {
            client: ALLOW,
            switches: true,
            ..introducing()
        });
        lab.ehlo();
        lab.sends("MAIL FROM:<a@b>\r\n");
        lab.session.member_connected(OWN, lab.now);
        lab.says("220 legacy\r\n");
        assert_eq!(lab.reached(), "EHLO c.example\r\n");
        lab.says(refusal);
        assert_eq!(lab.complaint, Some(Fault::Hello), "{refusal:?}");
        assert_eq!((lab.connects, lab.end), (3, None), "{refusal:?}");
        assert_eq!((lab.reached(), lab.heard()), Default::default());
    }
}
