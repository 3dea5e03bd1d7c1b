set -x
python3 -m pip install -q --no-index --no-deps --target /tmp/site whl/*.whl
export PYTHONPATH=$PWD:/tmp/site:$PWD/prebuilt KVZIP_LIBRARY=$PWD/prebuilt/libkvzip_native.so
nvidia-smi -L
timeout 100 python3 tests/gpu/fuzz_gpu.py --cases ${CASES:-12000} --seed 1 --json $OUT/fuzz_gpu.json 2>&1 | tail -60
timeout 60 python3 -m pytest -q -p no:cacheprovider tests/gpu/test_gpu_process.py 2>&1 | tail -30
