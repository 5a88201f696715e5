'use strict'
// The class Brizo of squid-js as it is, against a running service: node squid_js.js <file>
// The file holds what it works on, as JSON; tests/test_clients.py writes it. Every step prints one line of JSON.

const fs = require('node:fs')

// The library logs by console; standard output is for the steps.
console.log = console.error
// It looks for tokens it has stored in a browser.
globalThis.localStorage = { getItem: () => null }

const Web3 = require('web3')
const { Account, DDO, Logger } = require('@oceanprotocol/squid')
const { Brizo } = require('@oceanprotocol/squid/dist/node/brizo/Brizo')
const { OceanAuth } = require('@oceanprotocol/squid/dist/node/ocean/OceanAuth')
const { SignatureUtils } = require('@oceanprotocol/squid/dist/node/ocean/utils/SignatureUtils')
const { WebServiceConnector } = require('@oceanprotocol/squid/dist/node/ocean/utils/WebServiceConnector')

const given = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'))
const logger = console
// The chain's node has the account and signs, as a wallet would.
const web3 = new Web3(given.rpc)

// In place of keeper and metadata store, which are no more: the agreement is about one asset, whose document names us.
const asset = new DDO({
  id: given.did,
  service: [{ type: 'compute', index: 0, serviceEndpoint: `${given.provider}/api/v1/brizo/services/compute` }]
})
const ocean = {
  keeper: { agreementStoreManager: { getAgreement: async () => ({ did: given.did }) } },
  assets: { resolve: async () => asset },
  utils: { fetch: new WebServiceConnector(logger), signature: new SignatureUtils(web3, logger) }
}
const config = { ocean, web3, logger, config: { brizoUri: given.provider } }

function told(step, facts) {
  fs.writeSync(1, JSON.stringify({ step, ...facts }) + '\n')
}

async function main() {
  const brizo = new Brizo(config)
  ocean.auth = await OceanAuth.getInstance(config)
  const account = new Account(given.account, config)
  told('discovery', await brizo.getVersionInfo())

  const output = { publishOutput: true, publishAlgorithmLog: true }
  const start = (agreement, rawcode) =>
    brizo.compute('post', agreement, account, undefined, { ...given.algorithm, rawcode }, undefined, output)
  const until = async (agreement, jobId, reached) => {
    for (;;) {
      const [job] = await brizo.compute('get', agreement, account, undefined, undefined, jobId)
      if (reached(job) || job.dateFinished) return job
      await new Promise((resolve) => setTimeout(resolve, 200))
    }
  }

  const [first, second] = given.agreements
  const one = await start(first, given.quick)
  told('start', { job: one })
  told('again', { job: await start(first, given.quick) })
  const done = await until(first, one.jobId, () => false)
  told('status', { job: done })
  told('agreement', { jobs: await brizo.compute('get', first, account) })
  for (const link of [...done.resultsUrls, done.algorithmLogUrl]) {
    const answer = await ocean.utils.fetch.get(link)
    told('result', { text: await answer.text() })
  }

  // From here on by a token, made once, in place of a signature for each call.
  account.setToken(await ocean.auth.get(account))
  const two = await start(second, given.slow)
  told('start', { job: two })
  told('running', { job: await until(second, two.jobId, (job) => job.status === 3) })
  told('stop', { job: await brizo.compute('put', second, account, undefined, undefined, two.jobId) })
  told('stopped', { job: await until(second, two.jobId, () => false) })
  told('delete', { job: await brizo.compute('delete', second, account, undefined, undefined, two.jobId) })
  told('deleted', { jobs: await brizo.compute('get', second, account) })
}

main().catch(async (fault) => {
  console.error(fault)
  process.exitCode = 1
})
