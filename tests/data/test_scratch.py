import time
def test_a(tokenizer, make_rows, write_jsonl):
    t=time.time()
    print(tokenizer, len(tokenizer))
    rows = make_rows(100)
    print(rows[:3], [len(tokenizer(r["response"])["input_ids"]) for r in rows[:10]])
    from foundry_ext.data.dataloader import build_packed_finetuning_dataloader as b
    print("import", time.time()-t)
    for i in range(3):
        t=time.time()
        p = write_jsonl(rows)
        spec = b(tokenizer, 2, {"hf_name": str(p), "split":"train", "max_seq_len": 128, "pack_tokens": 256, "shuffle": True})
        print(time.time()-t, len(spec.dataloader), spec.dataloader.dataset.fingerprint)
