use super::*;

#[test]
fn built_in_catalogue_is_sound() {
    let catalogue = Catalogue::built_in().unwrap();
    let micro = catalogue.get("t3.micro").unwrap();
    assert_eq!((micro.vcpus, micro.memory_mib, micro.ecu_milli), (1, 1024, Some(500)));
    assert_eq!(catalogue.get("m5d.large").unwrap().resources().instance_store_bytes, 75 << 30);
    assert!(catalogue.iter().count() > 10);
}

#[test]
fn operators_replace_and_add() {
    let mut catalogue = Catalogue::built_in().unwrap();
    let own = "[[instance_type]]\nname = 't3.micro'\nvcpus = 2\nmemory_mib = 2048\n";
    catalogue.extend(Catalogue::parse(own).unwrap());
    assert_eq!(catalogue.get("t3.micro").unwrap().vcpus, 2);
}

#[test]
fn bad_entries_are_named() {
    let refused = |body: &str| Catalogue::parse(&format!("[[instance_type]]\n{body}")).unwrap_err().to_string();
    assert!(refused("name='a.b'\nvcpus=0\nmemory_mib=512").contains("'a.b': vcpus is 0"));
    assert!(refused("name='a.b'\nvcpus=33\nmemory_mib=512").contains("vcpus is 33"));
    assert!(refused("name='a.b'\nvcpus=1\nmemory_mib=64").contains("memory_mib is 64"));
    assert!(refused("name='plain'\nvcpus=1\nmemory_mib=512").contains("family.size"));
    assert!(refused("name='a.b'\nvcpus=1\nmemory_mib=512\ncolour='red'").contains("colour"));
    assert!(refused("name='a.b'\nvcpus=1\nmemory_mib=512\ninstance_store_gib=[0]").contains("instance_store_gib"));
    let twice = "[[instance_type]]\nname='a.b'\nvcpus=1\nmemory_mib=512\n".repeat(2);
    assert_eq!(Catalogue::parse(&twice).unwrap_err(), CatalogueError::Duplicate("a.b".into()));
}

proptest::proptest! {
    #[test]
    fn parsing_never_panics(text in ".{0,400}") {
        let _ = Catalogue::parse(&text);
    }
}
